"""Launch flags, in SGLang's newer and older spellings."""

import pytest

from sglang.server_args import ServerArgs, parse_args


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


@pytest.mark.parametrize(
    "values, part",
    [
        ({"schedule_policy": "zzz"}, "--schedule-policy is 'zzz'; there are: lpm, weight"),
        ({"model_mode": ["flash"]}, "--model-mode is 'flash'"),
        ({"max_body_mb": 0}, "--max-body-mb must be at least 1"),
        ({"max_queued_requests": -1}, "--max-queued-requests must not be negative"),
        ({"cuda_graph_max_bs": 0}, "--cuda-graph-max-bs must be at least 1"),
        ({"schedule_conservativeness": float("nan")}, "--schedule-conservativeness must be"),
        ({"api_key": ""}, "--api-key must not be empty"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(values: dict, part: str):
    """Those of scripts, too, which no command line has looked at."""
    with pytest.raises(ValueError, match=part):
        ServerArgs(**values)
