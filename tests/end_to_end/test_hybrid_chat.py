"""A chat on the real shape of granite-350m, synthetic weights: each turn computes its new message and little more."""

from typing import Any

import numpy as np
from conftest import answers

from tinyserve import LLM, SamplingParams

VOCAB = 100352
PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=20)


def build(**options: Any) -> LLM:
    return LLM(
        "granite-350m", load_format="dummy", dtype="int8", max_num_seqs=1, max_model_len=512, num_threads=2, **options
    )


def test_six_short_turns_compute_their_new_messages() -> None:
    llm = build()
    assert len(llm.config.layer_types) == 32 and llm.cache_plan.state_nbytes > 20e6
    draw = np.random.default_rng(3)
    history: list[int] = []
    for turn in range(6):
        message = draw.integers(VOCAB, size=5 + 4 * turn).tolist()
        history += message
        [output] = llm.generate([history], PARAMS)
        metrics = output.metrics
        # The last token of the answer before was sampled and not computed: to the cache it is part of the message.
        new = len(message) + (turn > 0)
        computed = metrics.prompt_tokens - metrics.cached_tokens
        assert new <= computed <= new + llm.cache_plan.block_size, f"turn {turn}"
        prompt, history = history, history + output.outputs[0].token_ids
    assert len(history) > 100
    plain = build(enable_prefix_caching=False)
    [fresh] = plain.generate([prompt], PARAMS)
    assert fresh.metrics.cached_tokens == 0 < metrics.cached_tokens
    assert answers([fresh]) == answers([output])


def test_a_template_that_writes_an_answer_otherwise() -> None:
    """The tokens of an answer may not be those that the next prompt has for it: then the prompt before is the place."""
    llm = build()
    draw = np.random.default_rng(4)
    first, rewritten, second = (draw.integers(VOCAB, size=size).tolist() for size in (21, 5, 8))
    [before] = llm.generate([first], PARAMS)
    assert before.outputs[0].token_ids[: len(rewritten)] != rewritten
    [after] = llm.generate([first + rewritten + second], PARAMS)
    assert after.metrics.prompt_tokens - after.metrics.cached_tokens == len(rewritten) + len(second)
    # Another conversation in between takes nothing away from this one.
    llm.generate([second], PARAMS)
    turn = first + rewritten + second + after.outputs[0].token_ids + [7]
    [third] = llm.generate([turn], PARAMS)
    assert third.metrics.prompt_tokens - third.metrics.cached_tokens == 2
