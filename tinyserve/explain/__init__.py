"""One text's way through a model, to be looked at: see `LLM.explain`."""

from tinyserve.explain.explanation import Cost, Explanation, Guess
from tinyserve.explain.sampling_steps import SamplingStep
from tinyserve.explain.taps import LayerTap

__all__ = ["Cost", "Explanation", "Guess", "LayerTap", "SamplingStep"]
