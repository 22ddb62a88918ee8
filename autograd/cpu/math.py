"""exp, tanh, erf, erfc and erfcx for kernels: inlined, branch-free, vectorised by LLVM, for float32 and float64.

libm's scalar functions are 5 to 10 times slower in a loop. Each function is made of polynomials in the
argument's precision, with both sides of a split computed and selected. NaN in gives NaN out. ``exp`` is exactly 0 below
-86.5 (float32) and -708 (float64): a subnormal result would slow every later multiplication.

The coefficients are Chebyshev interpolants of the functions, computed with 40 digits. Errors in ulp: exp and tanh 1.5,
erf 3, erfc 3 for x <= 0 and 6 + 2x² for x > 0, where the rounding of x² passes through exp; erfcx 4 (8 in float64).
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from .compile import EXACT, INLINED, inline

exact = inline(exact=True)  # regrouping would undo the two-part reduction in exp

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
_ERFCX = {  # e^(z²) erfc(z) / t in u = 2t - 1, t = 2/(2 + z), for z >= 0
    32: (0.510791356915945209, 0.343580332970096363, 0.139735733521929132, 0.0182213842457571066,
         -0.0107516261865845874, -0.0032418548953675042, 0.00152915716076369212, 0.00042702015076224992,
         -0.000299382712071564481, -0.0000329515392701853262, 0.0000421611971963878064, -1.327395517676192e-6),
    64: (0.510791352621011487566, 0.343580342206905298861, 0.139736046278027492027, 0.0182211157534388819741,
         -0.0107553309447554108094, -0.00323959253383613923192, 0.0015453060300572451169, 0.000418648030374935962879,
         -0.000331536760971279508021, -0.0000171857054574896350578, 0.0000722354574289379575334,
         -0.0000170745585685999826676, -0.0000108486107624814476898, 0.00000806106528117098900702,
         -5.60870342432340601268e-7, -0.0000018240871668600794581, 9.9615002610237797513e-7,
         4.36799480128191941358e-9, -2.77320078572689544052e-7, 1.52924653407985139716e-7,
         -1.16586085932203700211e-8, -4.39020638816278277603e-8, 3.73207064349013809151e-8,
         -4.47570299067631628789e-9, -1.42440615121779648344e-8, 6.85982881831338498818e-9,
         2.64494416318694206734e-9, -2.0716177810923205532e-9, -2.0568250908550237772e-10, 2.3899735525921274489e-10),
}
_LN2 = {32: (0.693359375, -2.12194440e-4), 64: (0.693145751953125, 1.42860682030941723212e-6)}
_BITS = {32: (np.int32, np.float32, 23, 127, -86.5, 89.0), 64: (np.int64, np.float64, 52, 1023, -708.0, 710.0)}


def _unrolled(body: str, name: str, constants: dict):
    """Compile a function from source, so that its loop over constants is written out."""
    space = dict(constants)
    exec(body, space)
    return exact(space[name])


def _polynomial(coefficients, number):
    """p(x) = c0 + x (c1 + x (c2 + ...))."""
    constants = {f"c{i}": number(c) for i, c in enumerate(coefficients)}
    nested = f"c{len(coefficients) - 1}"
    for i in reversed(range(len(coefficients) - 1)):
        nested = f"c{i} + x * ({nested})"
    return _unrolled(f"def p(x):\n    return {nested}\n", "p", constants)


def _functions(width: int) -> dict:
    """The functions for one precision."""
    integer, number, mantissa, bias, lowest, highest = _BITS[width]
    mantissa, bias, lowest, highest = integer(mantissa), integer(bias), number(lowest), number(highest)
    log2e, ln2_high, ln2_low = number(1 / math.log(2)), number(_LN2[width][0]), number(_LN2[width][1])
    zero, half, one, two = number(0), number(0.5), number(1), number(2)
    infinity, exp_series, tanh_series = number(math.inf), _polynomial(_EXP[width], number), _polynomial(_TANH[width], number)
    erf_series, erfcx_series = _polynomial(_ERF[width], number), _polynomial(_ERFCX[width], number)
    tanh_split, erf_split = number(0.625), number(0.75)

    @exact
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

    @exact
    def tanh(x):
        a = abs(x)
        near = x * tanh_series(x * x)
        far = one - two / (exp(a + a) + one)
        far = far if x > zero else -far
        return near if a < tanh_split else (far if x == x else x)

    @exact
    def erfcx(z):
        t = two / (two + z)
        return t * erfcx_series(t + t - one)

    @exact
    def erfc(x):
        z = abs(x)
        far = erfcx(z) * exp(-z * z)
        far = far if x > zero else two - far
        near = one - x * erf_series(x * x)
        return near if z < erf_split * half else (far if x == x else x)

    @exact
    def erf(x):
        z = abs(x)
        far = one - erfcx(z) * exp(-z * z)
        far = far if x > zero else -far
        near = x * erf_series(x * x)
        return near if z < erf_split else (far if x == x else x)

    return {"exp": exp, "tanh": tanh, "erf": erf, "erfc": erfc, "erfcx": erfcx}


_COMPILED = {width: _functions(width) for width in (32, 64)}


def _declare(name: str, formula: str):
    def function(x):
        raise TypeError(f"autograd.cpu.math.{name} is for use inside kernels")

    function.__name__ = name
    function.__doc__ = f"{formula} of a float32 or float64, inside kernels."

    @overload(function, jit_options={**EXACT, **INLINED})
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
erfcx = _declare("erfcx", "e^(x²) erfc(x), for x >= 0,")
