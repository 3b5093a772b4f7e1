"""Operations of the matrix products that a function traces, loops counted as often as they run: the same on every platform."""

import math

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(function, *arguments, exact=False):
    """How many multiplications and additions the matrix products of `function(*arguments)` take; what no output needs is left
    out, as a compiler leaves it out. Of branches the largest counts, and a `while` whose turns are not known counts once. `exact`
    counts those alone that ask for float32 products of the highest precision. `arguments` may be jax.ShapeDtypeStruct."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return _of(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], exact)


def _of(jaxpr, exact):
    return sum(_equation(equation, exact) for equation in jaxpr.eqns)


def _equation(equation, exact):
    kind, parameters = equation.primitive.name, equation.params
    if kind == "dot_general":
        if exact and parameters["precision"] != (jax.lax.Precision.HIGHEST,) * 2:
            return 0
        ((contracted, _), _), left = parameters["dimension_numbers"], equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    inner = [_of(jaxpr, exact) for jaxpr in core.jaxprs_in_params(parameters)]
    if kind == "cond":
        return max(inner)
    return sum(inner) * parameters.get("length", 1)
