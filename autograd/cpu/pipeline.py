"""How Numba compiles a kernel and the functions that only kernels call: the whole is optimised once.

Numba makes a library of every function that a kernel calls: it optimises it, turns it into machine code that can be called,
links it into the kernel, and optimises the whole once more. Here the functions are only simplified, without which some loops
of kernels are not packed, and the rest waits until they are part of a kernel. Passes for what kernels do not use (closures,
lists that are unrolled, fused expressions of arrays) are left out.
"""

from __future__ import annotations

from numba.core import typed_passes, untyped_passes
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder, Flags
from numba.core.compiler_machinery import PassManager
from numba.core.environment import lookup_environment
from numba.core.targetconfig import ConfigStack

from .process import uncollected

UNUSED = {
    untyped_passes.WithLifting, untyped_passes.InlineClosureLikes, untyped_passes.RewriteDynamicRaises,
    untyped_passes.MakeFunctionToJitFunction, untyped_passes.InlineInlinables, untyped_passes.FindLiterallyCalls,
    untyped_passes.LiteralUnroll, untyped_passes.LiteralPropagationSubPipelinePass, typed_passes.InlineOverloads,
    typed_passes.NopythonRewrites, typed_passes.DumpParforDiagnostics,
}

_flags: dict[Flags, Flags] = {}  # each combination once


class _Whole(JITCodeLibrary):
    """The code of a kernel with all that it calls."""

    def _finalize_specific(self):
        super()._finalize_specific()
        for variable in self._final_module.global_variables:  # those of inner functions, too
            environment = lookup_environment(variable.name)
            if environment is not None:
                self._codegen.set_env(variable.name, environment)


class _Part(_Whole):
    """The code of a function that only kernels call, which nobody runs by itself."""

    class _Nowhere:
        @staticmethod
        def set_env(name, environment):
            """Without machine code, there is no place to set it."""

    @property
    def codegen(self):
        return self._Nowhere

    def _optimize_final_module(self):
        """The kernel's is optimised."""

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0


class _Passes(PassManager):
    """The passes of one function."""

    def run(self, state):
        """Numba's own functions (min, max, zeros) depend on the flags that are on top of a stack: Numba compiles them for each
        combination, so the two that mean nothing to them are left out.
        """
        flags = state.flags.copy()
        flags.forceinline = flags.no_cpython_wrapper = False
        with uncollected(), ConfigStack().enter(_flags.setdefault(flags, flags)):
            super().run(state)


class _Compiler(CompilerBase):
    library: type[JITCodeLibrary]

    def define_pipelines(self):
        state = self.state
        state.library = self.library(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        passes = _Passes("kernel")
        passes.passes = [one for one in DefaultPassBuilder.define_nopython_pipeline(state).passes if one[0] not in UNUSED]
        passes.finalize()
        return [passes]


class KernelCompiler(_Compiler):
    """For kernels."""

    library = _Whole


class InnerCompiler(_Compiler):
    """For functions that only kernels call."""

    library = _Part
