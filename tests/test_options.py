"""What the backend's options accept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from padst_compile.errors import InvalidOptionError, UnknownFieldError, UnknownOptionError
from padst_compile.options import Options, read_options


@pytest.fixture(autouse=True)
def _no_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PADST_DUMP", raising=False)


def test_nothing_given_means_the_defaults() -> None:
    assert read_options(None, None) == read_options("default", {}) == Options()
    assert Options().kernels == "measure"


@pytest.mark.parametrize("policy", ["measure", "sparse", "dense"])
def test_every_policy_is_taken(policy: Any) -> None:
    assert read_options(None, {"kernels": policy}) == Options(policy)


@pytest.mark.parametrize("effort", ["off", "cached", "quick", "full"])
def test_every_effort_is_taken(effort: Any) -> None:
    assert read_options(None, {"autotune": effort}) == Options(autotune=effort)


@pytest.mark.parametrize(
    ("mode", "options", "effort"),
    [
        (None, None, "quick"),
        ("reduce-overhead", None, "quick"),
        ("max-autotune", None, "full"),
        ("max-autotune-no-cudagraphs", None, "full"),
        ("max-autotune", {"autotune": "cached"}, "cached"),
    ],
)
def test_max_autotune_means_full_effort_unless_another_is_given(mode: Any, options: Any, effort: str) -> None:
    assert read_options(mode, options).autotune == effort


def test_one_pass_or_several_may_be_disabled() -> None:
    assert read_options(None, {"disable": "AbsorbBias"}).disable == ("AbsorbBias",)
    assert read_options(None, {"disable": ["AbsorbBias", "FoldIntoNorm"]}).disable == ("AbsorbBias", "FoldIntoNorm")


def test_the_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PADST_DUMP", "/elsewhere")
    assert read_options(None, {}).dump == "/elsewhere"
    assert read_options(None, {"dump": tmp_path}).dump == str(tmp_path)


def test_inductor_options_and_modes_are_collected() -> None:
    assert read_options(None, {"max-autotune": True, "epilogue_fusion": False}).inductor == (
        ("max_autotune", True),
        ("epilogue_fusion", False),
    )
    assert dict(read_options("reduce-overhead", None).inductor) == {"triton.cudagraphs": True}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dumpp": "x"}, UnknownOptionError, r"unknown option of backend 'padst' 'dumpp'; did you mean 'dump'\?"),
        ({"kernels": None}, InvalidOptionError, r"is one of measure, sparse, dense, got None"),
        ({"kernels": ["dense"]}, InvalidOptionError, r"got \['dense'\]"),
        ({"autotune": "quik"}, InvalidOptionError, r"is one of off, cached, quick, full, got 'quik'; did you mean 'quick'\?"),
        ({"autotune": None}, InvalidOptionError, "is one of off, cached, quick, full, got None"),
        ({"autotune": ["full"]}, InvalidOptionError, "is one of off, cached, quick, full"),
        ({"autotun": "full"}, UnknownOptionError, r"did you mean 'autotune'\?"),
        ({"disable": 3}, InvalidOptionError, "is a list of pass names, got 3"),
        ({"disable": ["AbsorbBais"]}, UnknownFieldError, r"did you mean 'AbsorbBias'\?"),
        ({"dump": 5}, InvalidOptionError, r"options\['dump'\] is a folder, got 5"),
    ],
)
def test_wrong_options_are_named(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_options(None, options)


def test_an_unknown_mode_is_named_with_the_choices() -> None:
    with pytest.raises(InvalidOptionError, match="unknown mode 'fast'; choose from default, .*reduce-overhead"):
        read_options("fast", None)


def test_the_users_dictionary_is_left_alone() -> None:
    options = {"kernels": "dense", "max_autotune": False}
    read_options(None, options)
    assert options == {"kernels": "dense", "max_autotune": False}
