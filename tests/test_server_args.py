"""Launch flags, in SGLang's newer and older spellings."""

import pytest

from sglang.server_args import parse_args


def test_model_modes_are_the_flags_that_they_once_were():
    both = parse_args(["--model-mode", "flashinfer", "no-cache"])
    assert both.attention_backend == "flashinfer" and both.disable_radix_cache
    neither = parse_args([])
    assert neither.attention_backend == "auto" and not neither.disable_radix_cache
    assert parse_args(["--attention-backend", "flashinfer"]).attention_backend == "flashinfer"


def test_an_unknown_backend_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse_args(["--attention-backend", "flash"])
    error = capsys.readouterr().err
    assert "triton" in error and "flashinfer" in error and "torch_native" in error
