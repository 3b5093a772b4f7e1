"""How the tests compile: in half the time, where the compiler knows the option."""

import importlib.metadata

# XLA's older code generator compiles in about two thirds of the time. From jaxlib 0.11 on there is another alone, and XLA aborts
# at an option that it does not know.
_OLDER_GENERATOR = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
OPTIONS = {"xla_cpu_use_fusion_emitters": False} if _OLDER_GENERATOR else {}
FLAGS = " ".join(
    [f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()] + ["--xla_cpu_parallel_codegen_split_count=1"]
)


def jit(function, **options):
    """`jax.jit` with these options."""
    import jax

    return jax.jit(function, compiler_options=OPTIONS, **options)
