"""Block products from batched matrix products: no zeros multiplied, any device and dtype."""

from __future__ import annotations

import torch

from padst_compile.kernels.formats import Format
from padst_compile.structures import Block, Shape, Topology

# Gathered tiles are as large as the activations times the blocks per column: cut them to bound the extra memory.
_CHUNK_ELEMENTS = 1 << 24


class BlockFormat(Format[Block]):
    """Gathers the tile that each block reads, multiplies all of them at once, and sums by the tile each block writes."""

    def forward(
        self, structure: Block, x: torch.Tensor, values: torch.Tensor, topology: Topology, out_features: int
    ) -> torch.Tensor:
        """See `Format.forward`."""
        row_count, column_count = structure.grid(Shape(out_features, x.shape[1]))
        tiles = _tiles(x, column_count, structure.columns)
        product = _multiply(tiles, values, topology[1].long(), structure.block_rows(topology), row_count)
        return _untile(product, out_features)

    def input_gradient(
        self, structure: Block, grad: torch.Tensor, values: torch.Tensor, topology: Topology, in_features: int
    ) -> torch.Tensor:
        """See `Format.input_gradient`: the same product with every block transposed and the roles swapped."""
        row_count, column_count = structure.grid(Shape(grad.shape[1], in_features))
        tiles = _tiles(grad, row_count, structure.rows)
        blocks = values.transpose(1, 2)
        product = _multiply(tiles, blocks, structure.block_rows(topology), topology[1].long(), column_count)
        return _untile(product, in_features)

    def value_gradient(
        self, structure: Block, grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, topology: Topology
    ) -> torch.Tensor:
        """See `Format.value_gradient`: one product over the tokens per active block."""
        row_count, column_count = structure.grid(Shape(grad.shape[1], x.shape[1]))
        inputs, outputs = _tiles(x, column_count, structure.columns), _tiles(grad, row_count, structure.rows)
        rows, columns = structure.block_rows(topology), topology[1].long()
        gradient = torch.empty_like(values)
        for part in _chunks(columns.numel(), x.shape[0] * (structure.rows + structure.columns)):
            gradient[part] = inputs[columns[part]].transpose(1, 2) @ outputs[rows[part]]
        return gradient


def transposed_index(
    structure: Block, topology: Topology, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The topology of S.T for S [out, in], and where each of its blocks lies among those of S: all int32.

    Made on the device of the topology; nothing waits for it.
    """
    row_count, column_count = structure.grid(Shape(out_features, in_features))
    rows = structure.block_rows(topology)
    cells, order = torch.sort(topology[1].long() * row_count + rows)
    bounds = torch.arange(column_count + 1, device=cells.device) * row_count
    return torch.searchsorted(cells, bounds, out_int32=True), rows[order].int(), order.int()


def _tiles(x: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """[tokens, features] -> zero-padded [count, tokens, width]."""
    padded = torch.nn.functional.pad(x, (0, count * width - x.shape[1]))
    return padded.reshape(x.shape[0], count, width).transpose(0, 1)


def _untile(tiles: torch.Tensor, features: int) -> torch.Tensor:
    """[count, tokens, width] -> [tokens, features] without the padding."""
    return tiles.transpose(0, 1).flatten(1)[:, :features].contiguous()


def _multiply(
    tiles: torch.Tensor, blocks: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, target_count: int
) -> torch.Tensor:
    """`result[targets[k]] += tiles[sources[k]] @ blocks[k]` for every block k."""
    result = tiles.new_zeros(target_count, tiles.shape[1], blocks.shape[2])
    for part in _chunks(sources.numel(), tiles.shape[1] * (blocks.shape[1] + blocks.shape[2])):
        result.index_add_(0, targets[part], tiles[sources[part]] @ blocks[part])
    return result


def _chunks(count: int, elements_each: int) -> list[slice]:
    """Slices over `count` blocks that keep the gathered copies within `_CHUNK_ELEMENTS`."""
    step = max(1, _CHUNK_ELEMENTS // max(1, elements_each))
    return [slice(start, start + step) for start in range(0, count, step)]
