"""Pictures of a block: what is a box, what is tied to what, and what became of it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import timm
import torch
from torch import nn

import padst_compile as padst
from padst_compile.drawing.block_graph import BlockGraph, Box, Edge, first_block
from padst_compile.drawing.layout import lay_out
from padst_compile.drawing.picture import Picture, draw, picture
from padst_compile.errors import DrawingError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def vit(*targets: str, permutation: str = "random") -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    return padst.sparsify(model, padst.SparsitySpec("block:16", 0.75, permutation=permutation, targets=targets))


def images() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32)


def drawn(*targets: str) -> Picture:
    return picture(vit(*targets), "blocks.0", (images(),), {})


def titles(block: BlockGraph) -> list[str]:
    return [box.title for box in block.boxes]


def test_the_boxes_of_a_block_are_its_modules_and_permutations_in_order() -> None:
    boxes = titles(drawn("*.proj", "*.fc2").block)
    assert boxes[1:-1] == [
        "norm1", "attn.qkv", "attn", "permutation", "attn.proj", "+", "norm2", "mlp.fc1", "mlp.act", "permutation",
        "mlp.fc2", "+",
    ]  # fmt: skip
    assert boxes[-1] == "output"


def test_the_residual_stream_goes_around_the_branches() -> None:
    block = drawn("*.fc2").block
    names = titles(block)
    edges = {(names[edge.source], names[edge.target]) for edge in block.edges}
    assert {(names[0], "norm1"), (names[0], "+"), ("+", "+"), ("+", "norm2"), ("+", "output")} <= edges


def test_a_folded_permutation_is_gone_and_its_neighbours_are_marked() -> None:
    found = drawn("*.fc2")
    names = titles(found.block)
    assert {names[i]: fate for i, fate in found.fates.items()} == {
        "permutation": "folded: nothing is left",
        "mlp.fc1": "parameters reordered",
    }
    moved = {(names[found.block.edges[n].source], names[found.block.edges[n].target]) for n in found.reordered}
    assert moved == {("mlp.fc1", "mlp.act"), ("mlp.act", "permutation"), ("permutation", "mlp.fc2")}


def test_a_permutation_that_splits_heads_is_read_by_the_kernel() -> None:
    found = drawn("*.proj")
    names = titles(found.block)
    assert {names[i]: fate for i, fate in found.fates.items()} == {
        "permutation": "read by the kernel",
        "attn.proj": "reads through a table",
    }
    assert not found.reordered


@pytest.mark.parametrize(
    ("layers", "block"),
    [
        (["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv"], "blocks.0"),
        (["layers.0.blocks.0.attn.qkv", "layers.0.blocks.0.mlp.fc1"], "layers.0.blocks.0"),
        (["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"], "blocks.0"),
        (["encoder.block.0.layer.0.q", "encoder.block.0.layer.0.k"], "encoder.block.0.layer.0"),
        (["0", "2"], ""),
        (["fc1", "fc2"], ""),
    ],
)
def test_the_block_that_is_drawn_by_default(layers: list[str], block: str) -> None:
    assert first_block(layers) == block


def test_layouts_keep_boxes_apart_and_lead_long_edges_around() -> None:
    boxes = tuple(Box(name, "", "operation") for name in "abcd")
    edges = (Edge(0, 1, ""), Edge(0, 2, ""), Edge(1, 3, ""), Edge(2, 3, ""), Edge(0, 3, ""))
    layout = lay_out(BlockGraph("", boxes, edges))
    assert layout.rows == (0, 1, 1, 2)
    assert len(set(zip(layout.rows, layout.columns, strict=True))) == 4
    assert layout.lanes == (None, None, None, None, 0)


def test_a_picture_as_png(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    image = pytest.importorskip("PIL.Image")
    draw(vit("*.proj", "*.fc2"), tmp_path / "block.png", images())
    with image.open(tmp_path / "block.png") as drawn:
        assert drawn.format == "PNG"
        heading = drawn.convert("L").crop((0, 20, drawn.width, 100))  # words alone: without fonts it would be white
        assert heading.getextrema()[0] < 100


@pytest.mark.parametrize("suffix", [".svg", ".dot"])
def test_a_picture_names_every_box(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new folder" / f"block{suffix}"
    draw(vit("*.proj", "*.fc2"), path, images())
    text = path.read_text()
    assert all(word in text for word in ("attn.qkv", "mlp.fc1", "read by the kernel", "folded: nothing is left"))
    if suffix == ".svg":
        ET.fromstring(text)


def test_a_model_without_permutations_can_be_drawn(tmp_path: Path) -> None:
    draw(vit("*.fc2", permutation="none"), tmp_path / "block.svg", images())


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("block.gif", None, "write .svg, .png, .dot"),
        ("block.svg", "block.0", "no module 'block.0'"),
        ("block.svg", "blocks.0.drop_path1", "do not reach"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path: Path, name: str, block: str | None, message: str) -> None:
    with pytest.raises(DrawingError, match=message):
        draw(vit("*.fc2"), tmp_path / name, images(), block=block)
