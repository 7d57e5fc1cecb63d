"""The sampler: what penalties, bias and logprobs do to a row, and that other rows never notice."""

import numpy as np
import torch

from sglang.messages import RowSpec, pack
from sglang.worker.rows import _params
from sglang.worker.sampler import Sampler

VOCABULARY = 64


def spec(row, prompt=(1, 2), output=(), temperature=0.0, **kwargs):
    penalties = any(name.endswith("penalty") for name in kwargs)
    values = dict(
        row=row, cached_len=0, seed=row, temperature=temperature, top_p=1.0, top_k=0, min_p=0.0,
        frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, logit_bias={},
        suppress_until=0, suppress=[], top_logprobs=-1, prompt_len=len(prompt),
        history=pack([*prompt, *output]) if penalties else b"",
    )  # fmt: skip
    return RowSpec(**{**values, **kwargs})


def sample(sampler, specs, logits, length=10):
    rows = np.array([s.row for s in specs], dtype=np.int32)
    lengths = np.full(len(rows), length, dtype=np.int32)
    params = torch.from_numpy(_params(specs))
    tokens, logprobs = sampler(logits.clone(), rows, lengths, params, torch.from_numpy(lengths))
    return tokens.tolist(), logprobs


def sampler_for(*specs):
    sampler = Sampler(8, VOCABULARY, torch.device("cpu"))
    for s in specs:
        sampler.open(s)
    return sampler


def logits_of(n, seed=0):
    return torch.randn(n, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def test_penalties_are_those_of_the_openai_and_ctrl_formulas():
    s = spec(3, prompt=(5, 6), output=(7, 7, 8), frequency_penalty=0.5, presence_penalty=0.25,
             repetition_penalty=1.5)  # fmt: skip
    logits = logits_of(1)
    expected = logits[0].clone()
    for token in (5, 6, 7, 8):  # repetition: prompt and output
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    expected[7] -= 2 * 0.5 + 0.25
    expected[8] -= 0.5 + 0.25
    sampler = sampler_for(s)
    seen = logits.clone()
    sampler._adjustments[3].apply(seen[0], 10)
    torch.testing.assert_close(seen[0], expected)
    assert sample(sampler, [s], logits)[0] == [int(expected.argmax())]


def test_sampled_tokens_are_counted():
    s = spec(0, frequency_penalty=2.0)
    sampler, logits = sampler_for(s), torch.zeros(1, VOCABULARY)
    logits[0, 9], logits[0, 4] = 3.0, 2.0
    assert [sample(sampler, [s], logits)[0][0] for _ in range(4)] == [9, 4, 9, 0]


def test_bias_and_suppression_act_on_their_own_row_only():
    logits = logits_of(3)
    best = logits.argmax(-1).tolist()
    biased = spec(1, logit_bias={11: 100.0})
    suppressed = spec(2, suppress=[best[2]], suppress_until=12)
    specs = [spec(0), biased, suppressed]
    sampler = sampler_for(*specs)
    second = int(logits[2].topk(2).indices[1])
    assert sample(sampler, specs, logits, length=11)[0] == [best[0], 11, second]
    assert sample(sampler, specs, logits, length=12)[0] == [best[0], 11, best[2]]


def test_a_row_that_opens_anew_forgets_its_last_owner():
    sampler = sampler_for(spec(1, logit_bias={11: 100.0}, top_logprobs=2))
    assert not sampler.is_plain(np.array([0, 1]))
    sampler.open(spec(1))
    assert sampler.is_plain(np.array([0, 1]))


def test_logprobs_are_the_models_own_whatever_is_sampled():
    logits = logits_of(2)
    specs = [spec(0), spec(1, temperature=2.0, logit_bias={3: 5.0}, top_logprobs=4)]
    tokens, logprobs = sample(sampler_for(*specs), specs, logits)
    (message,) = logprobs.messages()
    expected = logits[1].log_softmax(-1)
    assert message.row == 1
    assert abs(message.logprob - float(expected[tokens[1]])) < 1e-5
    assert message.top_ids == expected.topk(4).indices.tolist()
    assert np.allclose(message.top_logprobs, expected.topk(4).values, atol=1e-5)


def test_a_seed_and_a_position_determine_the_token():
    specs = [spec(0, temperature=1.0), spec(1, temperature=1.0, seed=0)]
    logits = (logits_of(1) / 3).expand(2, -1)
    first = sample(sampler_for(*specs), specs, logits, length=5)[0]
    assert first[0] == first[1]
    draws = [sample(sampler_for(*specs), specs, logits, length=n)[0][0] for n in range(40)]
    assert len(set(draws)) > 5
