"""What `explain` says about small real models."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

import padst_compile as padst
from padst_compile.autotune.entry import MARGIN
from padst_compile.errors import UnknownOptionError


def tiny_vit(**changes: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, **changes).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def explained(permutation: str = "random", structure: str = "block:16", **options: object) -> padst.Explanation:
    spec = padst.SparsitySpec(structure=structure, sparsity=0.75, permutation=permutation)
    with torch.no_grad():
        return padst.explain(padst.sparsify(tiny_vit(), spec), images(), options=options)


def test_every_linear_layer_has_a_row_with_its_module_name() -> None:
    names = [layer.name for layer in explained().layers]
    assert names == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"]


def test_random_permutations_are_all_fused_into_the_kernels() -> None:
    account = explained(kernels="sparse").permutations
    assert (account.total, account.fused, account.remaining) == (4, 4, 0)


def test_a_layer_without_a_permutation_has_none_to_account_for() -> None:
    assert explained(permutation="none").permutations.total == 0


def test_identity_permutations_cancel_in_inference_only() -> None:
    model = padst.sparsify(tiny_vit(), padst.SparsitySpec(structure="block:16", sparsity=0.75, permutation="learned"))
    with torch.no_grad():
        assert padst.explain(model, images()).permutations.cancelled == 4
    training = padst.explain(model.train(), images())
    assert (training.permutations.cancelled, training.permutations.remaining) == (0, 0)


def fates_of(*targets: str, kernels: str = "sparse", side: str = "input", **options: object) -> padst.Explanation:
    spec = padst.SparsitySpec("block:16", 0.75, permutation="random", permutation_side=side, targets=targets)
    with torch.no_grad():
        return padst.explain(padst.sparsify(tiny_vit(), spec), images(), options={"kernels": kernels, **options})


def test_each_permutation_has_a_line_with_its_place_cost_and_reason() -> None:
    lines = {fate.layer: fate for fate in fates_of("*.proj", "*.fc2").fates}
    assert lines.keys() == {"blocks.0.attn.proj", "blocks.0.mlp.fc2"}
    read, folded = lines["blocks.0.attn.proj"], lines["blocks.0.mlp.fc2"]
    assert (read.side, read.outcome) == ("input", "read by the kernel")
    assert read.bytes_per_token > 0
    assert "divides its inputs as 3 x 64" in read.reason
    assert (folded.side, folded.outcome, folded.bytes_per_token) == ("input", "folded into neighbours", 0)


def test_a_reason_names_the_layers_that_see_the_same_features() -> None:
    lines = {fate.layer: fate for fate in fates_of("*.fc1", "*.fc2").fates}
    assert "written by blocks.0.mlp.fc1" in lines["blocks.0.mlp.fc2"].reason


def test_an_output_permutation_is_written_by_the_kernel() -> None:
    (fate,) = fates_of("*.fc1", side="output", disable=["PlacePermutations"]).fates
    assert (fate.side, fate.outcome) == ("output", "written by the kernel")


def test_identities_are_cancelled_permutation_by_permutation() -> None:
    assert [fate.outcome for fate in explained(permutation="learned").fates] == ["cancelled"] * 4


def test_the_dense_weight_takes_on_the_permutations_of_a_layer_that_runs_dense() -> None:
    explanation = fates_of("*.proj", "*.fc2", kernels="dense")
    assert {fate.outcome for fate in explanation.fates} == {"folded into the dense weight", "folded into neighbours"}
    assert (explanation.permutations.folded, explanation.permutations.fused) == (2, 0)


def test_a_permutation_that_stays_an_operation_has_the_cost_of_one() -> None:
    passes = ["FuseInputPermutation", "FuseOutputPermutation", "PlacePermutations"]
    explanation = fates_of("*.proj", disable=passes)
    (fate,) = explanation.fates
    assert (fate.outcome, explanation.permutations.remaining) == ("separate op", 1)
    assert fate.bytes_per_token > fates_of("*.proj").fates[0].bytes_per_token


def test_a_permutation_that_no_kernel_took_up_folds_once() -> None:
    explanation = fates_of("*.fc2", disable=["FuseInputPermutation", "FuseOutputPermutation"])
    assert (explanation.permutations.total, explanation.permutations.folded, explanation.permutations.fused) == (1, 1, 0)
    assert [fate.outcome for fate in explanation.fates] == ["folded into neighbours"]


@pytest.mark.parametrize("structure", ["nm:1:4", "diagonal"])
def test_kernels_that_read_through_an_index_anyway_say_so(structure: str) -> None:
    for fate in explained(structure=structure, kernels="sparse").fates:
        assert fate.bytes_per_token == 0
        assert fate.outcome.startswith("folded") or "in any case" in fate.reason


def test_training_folds_nothing_and_says_why() -> None:
    model = padst.sparsify(tiny_vit(), padst.SparsitySpec("block:16", 0.75, permutation="random"))
    explanation = padst.explain(model.train(), images(), options={"kernels": "sparse"})
    assert [fate.outcome for fate in explanation.fates] == ["read by the kernel"] * 4
    assert {fate.reason for fate in explanation.fates} == {"training: its values may change at every step"}


def test_other_sizes_do_not_make_the_captured_graph_dynamic() -> None:
    model = padst.sparsify(tiny_vit(), padst.SparsitySpec("block:16", 0.75, permutation="random", targets=("*.fc2",)))
    with torch.no_grad():
        found = [padst.explain(model, torch.randn(batch, 3, 32, 32)).fates for batch in (2, 3, 5)]
    assert found[0] == found[1] == found[2]


def test_the_reason_for_a_dense_layer_is_told() -> None:
    rows = {layer.name: layer for layer in explained().layers}
    assert rows["head"].kernel == "dense"
    assert "left dense by the specification" in rows["head"].reason


def test_the_measured_decision_carries_both_sides() -> None:
    layer = explained().layers[0]
    assert layer.speedup is not None
    assert (layer.kernel == "dense") == (layer.speedup < 1 / (1 + MARGIN))
    assert "tokens" in layer.reason


def test_forced_kernels_say_who_asked() -> None:
    layer = explained(kernels="dense").layers[0]
    assert (layer.kernel, layer.speedup) == ("dense", None)
    assert "options" in layer.reason


def test_memory_is_what_the_tensors_take() -> None:
    model = padst.sparsify(tiny_vit(), padst.SparsitySpec(structure="block:16", sparsity=0.75, permutation="random"))
    with torch.no_grad():
        explanation = padst.explain(model, images())
    expected = sum(t.numel() * t.element_size() for _, layer in padst.sparse_layers(model) for t in layer.state_dict().values())
    assert explanation.sparse_bytes == expected
    assert explanation.dense_bytes == 4 * (192 * 576 + 576 + 192 * 192 + 192 + 2 * 192 * 768 + 768 + 192)


def test_a_graph_break_is_counted_with_its_reason() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = padst.sparsify(Breaks(), padst.SparsitySpec(structure="block:16", sparsity=0.5))
    with torch.no_grad():
        explanation = padst.explain(model, torch.randn(4, 32))
    assert explanation.compilations == 2
    assert len(explanation.graph_breaks) == 1


def test_a_layer_that_the_inputs_do_not_reach_is_shown_as_eager() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = padst.sparsify(Skips(), padst.SparsitySpec(structure="block:16", sparsity=0.5))
    with torch.no_grad():
        kernels = {layer.name: layer.kernel for layer in padst.explain(model, torch.randn(4, 32)).layers}
    assert kernels["unused"] == "eager"
    assert kernels["used"] != "eager"


def test_a_compiled_model_can_be_explained() -> None:
    model = padst.sparsify(tiny_vit(), padst.SparsitySpec(structure="block:16", sparsity=0.75))
    with torch.no_grad():
        assert len(padst.explain(torch.compile(model, backend="eager"), images()).layers) == 5


def test_explaining_twice_says_the_same_and_leaves_the_model_alone() -> None:
    model = padst.sparsify(tiny_vit(), padst.SparsitySpec(structure="nm:1:4", permutation="random"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        first, second = (padst.explain(model, images(), options={"autotune": "off"}) for _ in range(2))
    assert first.layers == second.layers
    assert (first.compilations, second.compilations) == (1, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_it_prints_a_table_and_converts_to_json() -> None:
    explanation = explained(kernels="sparse")
    text = str(explanation)
    assert "blocks.0.attn.qkv" in text
    assert "4 total" in text
    assert explanation.fates[0].outcome in text
    assert json.loads(json.dumps(explanation.to_dict()))["compilations"] == 1


def test_unknown_options_are_refused() -> None:
    with pytest.raises(UnknownOptionError, match="kernels"):
        explained(kernel="sparse")
