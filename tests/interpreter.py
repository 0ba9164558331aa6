"""What the tests need of Pallas' TPU interpreter and JAX keeps private: one place to mend when it moves."""

from collections.abc import Callable

from jax.experimental.pallas import tpu as pltpu


def simulated(cores: int) -> pltpu.InterpretParams:
    """A TPU of so many cores with its memory spaces: what nobody wrote is NaN, and races are looked for."""
    return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores)


def raced(run: Callable[[], object]) -> bool:
    """Whether `simulated` cores touched the same memory while `run` ran; newer JAX raises, older JAX notes it."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    interpreter.reset_tpu_interpret_mode_state()
    try:
        run()
        return interpreter.races is not None and interpreter.races.races_found
    except Exception as error:
        if "race" not in str(error).lower():
            raise
        return True
    finally:
        interpreter.reset_tpu_interpret_mode_state()
