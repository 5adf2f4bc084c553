"""The specification: what it accepts, how it travels through JSON, and the one error that each wrong value gets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from padst_compile import NM, Block, Diagonal, SparsitySpec, Unstructured, load_spec, save_spec
from padst_compile.errors import PatternError, SparsityMismatchError, SpecError, UnknownFieldError
from padst_compile.spec import matches, spec_from_dict, spec_to_dict
from padst_compile.testing.strategies import specs

MAPPINGS = st.dictionaries(st.text(min_size=1), st.none() | specs(), max_size=3)


def test_a_specification_is_immutable_and_hashable() -> None:
    spec = SparsitySpec(Block(64), 0.9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.sparsity = 0.5  # type: ignore[misc]  # that is the point
    assert {spec: 1}[SparsitySpec("block:64", 0.9)] == 1  # type: ignore[arg-type]  # short forms are accepted


@pytest.mark.parametrize(
    ("short", "structure"),
    [
        ("block:64", Block(64)),
        ("block:32x16", Block((32, 16))),
        ("nm:2:4", NM(2, 4)),
        ("diagonal:4", Diagonal(4)),
        ("unstructured", Unstructured()),
    ],
)
def test_a_structure_may_be_given_in_its_short_form(short: str, structure: Any) -> None:
    assert SparsitySpec(short, 0.5).structure == structure  # type: ignore[arg-type]


@given(specs())
def test_a_specification_survives_json(spec: SparsitySpec) -> None:
    assert SparsitySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@given(st.one_of(specs(), MAPPINGS))
def test_a_specification_or_a_mapping_survives_json_with_its_version(spec: Any) -> None:
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


@given(st.one_of(specs(), MAPPINGS))
def test_a_file_gives_back_what_was_saved(tmp_path_factory: pytest.TempPathFactory, spec: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "spec.json"
    save_spec(spec, path)
    loaded = load_spec(path)
    assert loaded == spec
    if not isinstance(loaded, SparsitySpec):
        assert list(loaded) == list(spec)  # the first pattern that matches decides, so the order counts


def test_defaults_need_not_be_written() -> None:
    assert SparsitySpec.from_dict({"structure": "block:64", "sparsity": 0.9}) == SparsitySpec(Block(64), 0.9)


def test_nm_brings_its_own_sparsity() -> None:
    assert SparsitySpec(NM(1, 4)).sparsity == 0.75
    assert SparsitySpec(NM(1, 4)).density == 0.25


@pytest.mark.parametrize(("structure", "written"), [(NM(1, 10), 0.9), (NM(1, 3), 0.67), (NM(2, 4), 0.5)])
def test_nm_accepts_its_sparsity_as_people_write_it(structure: NM, written: float) -> None:
    assert SparsitySpec(structure, written).sparsity == 1 - structure.n / structure.m


def test_nm_refuses_another_sparsity_and_names_its_own() -> None:
    with pytest.raises(SparsityMismatchError, match=r"nm:2:4 has sparsity 0\.5, not 0\.9; leave sparsity out"):
        SparsitySpec(NM(2, 4), 0.9)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf"), True, "0.9", [0.9]], ids=repr)
def test_a_sparsity_outside_its_range_is_refused_with_the_range(sparsity: Any) -> None:
    with pytest.raises(SpecError, match="sparsity is the fraction of zeros, at least 0 and below 1; got"):
        SparsitySpec(Block(4), sparsity)


@pytest.mark.parametrize("structure", [Block(4), Diagonal(), Unstructured()], ids=str)
def test_a_missing_sparsity_is_asked_for(structure: Any) -> None:
    with pytest.raises(SpecError, match=r"needs a sparsity, for example sparsity=0\.9"):
        SparsitySpec(structure)


@pytest.mark.parametrize("structure", [None, 64, ("block", 64)], ids=repr)
def test_what_is_no_structure_is_refused_with_the_choices(structure: Any) -> None:
    with pytest.raises(SpecError, match="structure must be Block, NM, Diagonal, Unstructured or a registered one"):
        SparsitySpec(structure, 0.9)


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("permutation", "lerned", "did you mean 'learned'"),
        ("permutation", None, "choose from|did you mean 'none'"),
        ("permutation_side", "inputs", "did you mean 'input'"),
        ("distribution", "erks", "did you mean 'erk'"),
        ("init", "magnitud", "did you mean 'magnitude'"),
        ("init", 3, "choose from activation, magnitude, random"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_closest_one(field: str, value: Any, hint: str) -> None:
    with pytest.raises(UnknownFieldError, match=rf"unknown {field} in the specification: .*({hint})"):
        SparsitySpec(Block(4), 0.5, **{field: value})


def test_erk_refuses_nm_and_names_the_alternative() -> None:
    with pytest.raises(SpecError, match="'erk' varies the sparsity per layer, which N:M fixes; use 'uniform'"):
        SparsitySpec(NM(2, 4), distribution="erk")


@pytest.mark.parametrize("field", ["targets", "ignore"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (("",), "takes non-empty strings, got ''"),
        ((1,), "takes non-empty strings, got 1"),
        (5, "takes a sequence of patterns, got 5"),
        (("re:(",), "'re:\\(' is no regular expression"),
    ],
    ids=repr,
)
def test_a_wrong_pattern_is_refused_with_its_field(field: str, value: Any, message: str) -> None:
    with pytest.raises(PatternError, match=f"{field}:? ?{message}"):
        SparsitySpec(Block(4), 0.5, **{field: value})


@pytest.mark.parametrize("seed", [1.5, "1", None, True], ids=repr)
def test_a_seed_must_be_an_integer(seed: Any) -> None:
    with pytest.raises(SpecError, match="seed must be an integer"):
        SparsitySpec(Block(4), 0.5, seed=seed)


def test_one_pattern_may_be_a_bare_string() -> None:
    assert SparsitySpec(Block(4), 0.5, targets="fc*").targets == ("fc*",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", "", True),
        ("blocks.*.fc1", "blocks.3.mlp.fc1", True),
        ("fc1", "blocks.3.fc1", False),
        ("FC1", "fc1", False),
        ("fc[12]", "fc2", True),
        ("re:fc[12]", "fc2", True),
        ("re:fc", "fc2", False),
        ("re:.*fc.", "a.fc2", True),
    ],
)
def test_globs_and_regular_expressions_match_whole_names(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"structure": "block:4", "sparsety": 0.5}, "unknown key in the specification 'sparsety'; did you mean 'sparsity'"),
        ({"structure": "block:4", 3: 0.5}, "unknown key in the specification '3'"),
        ({"sparsity": 0.5}, "needs a structure, for example"),
        ({"structure": {"kind": "blok", "size": 4}}, "unknown structure 'blok'; did you mean 'block'"),
        ({"structure": {"kind": ["block"]}}, r"unknown structure \"\['block'\]\""),
        ({"structure": {"size": 4}}, "unknown structure 'None'"),
        ({"structure": {"kind": "nm", "n": 1, "q": 4}}, "unknown field of structure 'nm' 'q'"),
        ({"structure": {"kind": "nm", "n": 1}}, "structure 'nm' needs the fields n, m, vector"),
        ({"structure": {"kind": "block", "size": 2.5}, "sparsity": 0.5}, r"Block takes a size or \(rows, columns\), got 2\.5"),
        ({"structure": {"kind": "block", "size": [1, 2, 3]}}, r"Block takes a size or \(rows, columns\)"),
        ({"structure": {"kind": "diagonal", "group": 0}}, "the group of Diagonal must be a positive integer, got 0"),
        ({"structure": "blok:4"}, "unknown structure 'blok'; did you mean 'block'"),
        ({"structure": "block:four"}, "cannot read structure 'block:four'; write one of block:64"),
        ([1, 2], r"a specification is a mapping \(a JSON object\), got \[1, 2\]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_dictionary_is_refused_with_what_is_wrong(data: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SparsitySpec.from_dict(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"version": 2, "spec": {}}, "specification version 2 is not 1; write the file with save_spec"),
        ({"spec": {}}, "specification version None is not 1"),
        ({"version": 1, "layer": {}}, "unknown key in the specification file 'layer'; did you mean 'layers'"),
        ({"version": 1}, "either 'spec' or 'layers'"),
        ({"version": 1, "spec": {}, "layers": {}}, "either 'spec' or 'layers'"),
        ({"version": 1, "layers": ["fc"]}, r"'layers' is a mapping \(a JSON object\), got \['fc'\]"),
        ({"version": 1, "spec": None}, "a specification is a mapping"),
        ([], r"a specification file is a mapping \(a JSON object\), got \[\]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_file_is_refused_with_what_is_wrong_and_with_its_name(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_from_dict(data)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SpecError, match=rf"broken\.json: .*{message}"):
        load_spec(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"null"], ids=repr)
def test_a_corrupted_file_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"broken\.json: "):
        load_spec(path)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_spec(tmp_path / "none.json")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    save_spec(SparsitySpec(Block(64), 0.9), path)
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        save_spec({"*": "block:64"}, path)  # type: ignore[dict-item]  # no SparsitySpec
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_replaces_the_file_instead_of_writing_into_it(tmp_path: Path) -> None:
    path, link = tmp_path / "spec.json", tmp_path / "reader.json"
    save_spec(SparsitySpec(Block(64), 0.9), path)
    link.hardlink_to(path)  # stands for a reader that has the old file open
    before = link.read_bytes()
    save_spec(SparsitySpec(Block(32), 0.8), path)
    assert link.read_bytes() == before
    assert load_spec(path) == SparsitySpec(Block(32), 0.8)
    assert sorted(tmp_path.iterdir()) == [link, path]


def test_a_saved_file_can_be_read_by_whoever_may_read_new_files(tmp_path: Path) -> None:
    ordinary, saved = tmp_path / "ordinary", tmp_path / "saved"
    ordinary.write_text("")
    save_spec(SparsitySpec(Block(64), 0.9), saved)
    assert saved.stat().st_mode == ordinary.stat().st_mode
