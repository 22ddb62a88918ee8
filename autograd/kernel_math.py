"""exp, tanh, erf and erfc for kernels: inlined, branch-free, vectorised by LLVM, for float32 and float64.

libm's scalar functions are 5 to 10 times slower in a loop. Each function is a polynomial or Chebyshev series in the
argument's precision, with both sides of a split computed and selected. NaN in gives NaN out. ``exp`` is exactly 0 below
-86.5 (float32) and -708 (float64): a subnormal result would slow every later multiplication.

The coefficients are Chebyshev interpolants of the functions, computed with 40 digits. Errors in ulp: exp and tanh 1.5,
erf 3, erfc 3 for x <= 0 and 6 + 2x² for x > 0, where the rounding of x² passes through exp.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import types
from numba.extending import overload

from .kernels import FLAGS

# Without "reassoc": regrouping would undo the two-part reduction in exp.
_FLAGS = {**FLAGS, "fastmath": FLAGS["fastmath"] - {"reassoc"}, "forceinline": True}

_EXP = {  # e^r for |r| <= ln(2)/2
    32: (1.0, 1.0, 0.500000010774938358, 0.166664154772353224, 0.0416662182744019062, 0.00837512889046747393,
         0.0013948580818093911),
    64: (1.0, 1.0, 0.5, 0.166666666666667024, 0.0416666666666667217, 0.00833333333330952564, 0.00138888888888614221,
         0.000198412699092198422, 0.0000248015873669157571, 2.75572249561107229e-6, 2.75572394676340815e-7,
         2.51148702194974753e-8, 2.09250313383031481e-9),
}
_TANH = {  # tanh(x)/x in x² for |x| <= 0.625
    32: (1.0, -0.333333297571972735, 0.133331845410139021, -0.0539448878436477243, 0.0216927550633079888,
         -0.00816123069562577327, 0.0021303085527714399),
    64: (1.0, -0.333333333333333321, 0.133333333333331188, -0.053968253968112262, 0.0218694885312652718,
         -0.00886323542864689661, 0.00359212667502040869, -0.00145582191847590817, 0.000589947479876471451,
         -0.000238765154704028919, 0.0000957385242209283986, -0.0000366074483472154073, 0.0000117793336602299117,
         -2.26604536993699619e-6),
}
_ERF = {  # erf(x)/x in x² for |x| <= 0.75
    32: (1.12837916560453928, -0.376126196973736677, 0.112833897681001151, -0.0268352749087859904,
         0.00511565723611528516, -0.00067587879915492206),
    64: (1.12837916709551257, -0.376126389031837172, 0.112837916709526143, -0.0268661706444326354,
         0.00522397761546845624, -0.000854832619193706402, 0.000120552896958132121, -0.0000149241995108525999,
         1.64307325846643759e-6, -1.59404715845833401e-7, 1.14739380216122585e-8),
}
_ERFC = {  # Chebyshev series of ln(erfc(z)/t) + z² in u = 2t - 1, t = 2/(2 + z), z >= 0; the first coefficient halved
    64: (-0.6513268598908547171, 0.6419697923564902603, 0.019476473204185836312, -0.0095615147868086316419,
         -0.0009465953444820368663, 0.00036683949785276145187, 0.000042523324806907771645, -0.000020278578112534243154,
         -1.6242900046470255135e-6, 1.3036558355805232018e-6, 1.5626441722066143178e-8, -8.5238095914926542525e-8,
         6.5290544390988514958e-9, 5.0593434955514689422e-9, -9.9136415649303308684e-10, -2.2736512229318358581e-10,
         9.6467911020155268521e-11, 2.3940380830391141252e-12, -6.8860275264975528432e-12, 8.9448792730907224411e-13,
         3.1309213993429581137e-13, -1.1270822361367220231e-13, 3.8109052551837179455e-16, 7.1060976136098559401e-15,
         -1.5230282014576084713e-15, -9.4574945712671374341e-17, 1.2102371892252094067e-16, -2.8166630877871197224e-17),
}
_ERFC[32] = _ERFC[64][:10]
_LN2 = {32: (0.693359375, -2.12194440e-4), 64: (0.693145751953125, 1.42860682030941723212e-6)}
_BITS = {32: (np.int32, np.float32, 23, 127, -86.5, 89.0), 64: (np.int64, np.float64, 52, 1023, -708.0, 710.0)}


def _unrolled(body: str, name: str, constants: dict):
    """Compile a function from source, so that its loop over constants is written out."""
    space = dict(constants)
    exec(body, space)
    return numba.njit(**_FLAGS)(space[name])


def _polynomial(coefficients, number):
    """p(x) = c0 + x (c1 + x (c2 + ...))."""
    constants = {f"c{i}": number(c) for i, c in enumerate(coefficients)}
    nested = f"c{len(coefficients) - 1}"
    for i in reversed(range(len(coefficients) - 1)):
        nested = f"c{i} + x * ({nested})"
    return _unrolled(f"def p(x):\n    return {nested}\n", "p", constants)


def _chebyshev(coefficients, number):
    """s(u) = Σ c_k T_k(u), by Clenshaw's recurrence."""
    constants = {f"c{i}": number(c) for i, c in enumerate(coefficients)}
    n = len(coefficients) - 1
    lines = ["def s(u):", "    v = u + u", f"    b{n} = c{n}", f"    b{n - 1} = c{n - 1} + v * b{n}"]
    lines += [f"    b{i} = c{i} + (v * b{i + 1} - b{i + 2})" for i in reversed(range(1, n - 1))]
    return _unrolled("\n".join([*lines, "    return c0 + (u * b1 - b2)\n"]), "s", constants)


def _functions(width: int) -> dict:
    """The functions for one precision."""
    integer, number, mantissa, bias, lowest, highest = _BITS[width]
    njit = numba.njit(**_FLAGS)
    mantissa, bias, lowest, highest = integer(mantissa), integer(bias), number(lowest), number(highest)
    log2e, ln2_high, ln2_low = number(1 / math.log(2)), number(_LN2[width][0]), number(_LN2[width][1])
    zero, half, one, two = number(0), number(0.5), number(1), number(2)
    infinity, exp_series, tanh_series = number(math.inf), _polynomial(_EXP[width], number), _polynomial(_TANH[width], number)
    erf_series, erfc_series = _polynomial(_ERF[width], number), _chebyshev(_ERFC[width], number)
    tanh_split, erf_split = number(0.625), number(0.75)

    @njit
    def exp(x):
        # e^x = 2^k e^r with r = x - k ln 2 in two parts; 2^k is written into the exponent bits.
        inside = min(max(x, lowest), highest)
        k = np.floor(inside * log2e + half)
        r = (inside - k * ln2_high) - k * ln2_low
        power = integer(((integer(k) - integer(1)) + bias) << mantissa).view(number)
        y = exp_series(r) * two * power  # 2^(k - 1) alone may be subnormal
        y = y if x > lowest else zero
        y = y if x < highest else infinity
        return y if x == x else x

    @njit
    def tanh(x):
        a = abs(x)
        near = x * tanh_series(x * x)
        far = one - two / (exp(a + a) + one)
        far = far if x > zero else -far
        return near if a < tanh_split else (far if x == x else x)

    @njit
    def erfc(x):
        z = abs(x)
        t = two / (two + z)
        far = t * exp(erfc_series(t + t - one) - z * z)
        far = far if x > zero else two - far
        near = one - x * erf_series(x * x)
        return near if z < erf_split * half else (far if x == x else x)

    @njit
    def erf(x):
        z = abs(x)
        t = two / (two + z)
        far = one - t * exp(erfc_series(t + t - one) - z * z)
        far = far if x > zero else -far
        near = x * erf_series(x * x)
        return near if z < erf_split else (far if x == x else x)

    return {"exp": exp, "tanh": tanh, "erf": erf, "erfc": erfc}


_COMPILED = {width: _functions(width) for width in (32, 64)}


def _declare(name: str, formula: str):
    def function(x):
        raise TypeError(f"kernel_math.{name} is for use inside kernels")

    function.__name__ = name
    function.__doc__ = f"{formula} of a float32 or float64, inside kernels."

    @overload(function, jit_options=_FLAGS)
    def _(x):
        if isinstance(x, types.Float):
            compiled = _COMPILED[x.bitwidth][name]
            return lambda x: compiled(x)
        return None

    return function


exp = _declare("exp", "e^x")
tanh = _declare("tanh", "tanh x")
erf = _declare("erf", "(2/√π) ∫₀ˣ e^(-t²) dt")
erfc = _declare("erfc", "1 - erf(x)")
