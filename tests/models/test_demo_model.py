"""The demo model, from its file."""

import torch

from sglang import demo_model
from tests.models import tiny
from tests.reference import demo_model_in_transformers

PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


def test_logits_are_those_of_transformers_with_the_same_weights():
    theirs, _ = demo_model_in_transformers()
    with torch.inference_mode():
        wanted = theirs(torch.tensor([PROMPT])).logits[0]
    exact, _ = tiny.load(demo_model.fetch(), dtype="float32")
    logits = tiny.our_logits(exact, PROMPT)
    torch.testing.assert_close(logits, wanted, atol=2e-3, rtol=1e-4)
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))

    as_stored, _ = tiny.load(demo_model.fetch())
    logits = tiny.our_logits(as_stored, PROMPT)
    assert (logits - wanted).norm() < 1e-3 * wanted.norm()
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
