"""Sparse training inside transformers' Trainer, accelerate and Lightning, interrupted and continued."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import padst_compile as padst
from padst_compile.conversion import sparse_layers
from padst_compile.errors import AttachError, ResumeError

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

STEPS = 8


class Text(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": ids, "labels": ids}


def trainer(folder: Path, *, callback: bool = True, **settings: Any) -> Any:
    from padst_compile.integrations.transformers import PadstCallback

    transformers.set_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    model = padst.sparsify(model, padst.SparsitySpec(padst.Block(8), sparsity=0.5, permutation="learned"))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1,
        save_steps=5, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip

    def config(steps: int) -> padst.DSTConfig:
        assert steps == STEPS
        learned = padst.LearnedPermutation("autoshuffle", deadline=0.8)
        return padst.DSTConfig(interval=2, end=1.0, total_steps=steps, check_invariants=True, permutation=learned)

    callbacks = [PadstCallback(config)] if callback else []
    return transformers.Trainer(model=model, args=arguments, train_dataset=Text(), callbacks=callbacks)


def losses(one: Any) -> list[float]:
    return [row["loss"] for row in one.state.log_history if "loss" in row]


def test_a_trainer_trains_sparsely_and_a_resumed_one_has_the_same_losses(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    rows = [row for row in whole.state.log_history if "loss" in row]
    assert [row["padst/updates"] for row in rows] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert [row["padst/hardened"] > 0 for row in rows] == [step >= 7 for step in range(1, STEPS + 1)]
    assert not any(layer.soft is not None for _, layer in sparse_layers(whole.model))  # finalized
    resumed = trainer(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert losses(resumed) == losses(whole)
    pairs = zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for (_, one), other in pairs)


def test_a_checkpoint_without_the_callback_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, callback=False).train()
    with pytest.raises(ResumeError, match="checkpoint-5 has no state of the sparse training"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_bit_that_flips_in_the_state_is_noticed(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    file = tmp_path / "checkpoint-5" / "padst_runtime.pt"
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda record: record.file_size))
    content[content.index(largest) + len(largest) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        ResumeError, match=r"padst_runtime\.pt cannot be read \(.* is not as it was written\); resume from another"
    ):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_soft_permutations_in_float16_are_refused(tmp_path: Path) -> None:
    from padst_compile.integrations.transformers import PadstCallback

    config = padst.DSTConfig(total_steps=4, permutation=padst.LearnedPermutation("autoshuffle"))
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.fp16 = True
    state = transformers.TrainerState(max_steps=4)
    with pytest.raises(AttachError, match="train in bfloat16"):
        PadstCallback(config).on_train_begin(arguments, state, None, model=nn.Linear(2, 2), optimizer=None)


def test_accelerate_trains_saves_and_loads(tmp_path: Path) -> None:
    import accelerate

    def make() -> tuple[Any, nn.Module, torch.optim.Optimizer, padst.Runtime]:
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = padst.sparsify(
            nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)), padst.SparsitySpec(padst.Block(8), sparsity=0.5)
        )
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        config = padst.DSTConfig(interval=2, end=1.0, total_steps=6, check_invariants=True)
        runtime = padst.attach(model, optimizer, config)
        accelerator.register_for_checkpointing(runtime)
        return accelerator, model, optimizer, runtime

    def train(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
        found = []
        for number in range(first, last):  # every second one is a step
            with accelerator.accumulate(model):
                x = torch.randn(4, 16, generator=torch.Generator().manual_seed(number))
                loss = model(x).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
        return found

    accelerator, model, optimizer, runtime = make()
    train(accelerator, model, optimizer, 0, 6)
    accelerator.save_state(str(tmp_path))
    expected = train(accelerator, model, optimizer, 6, 12)
    assert (runtime.step, runtime.updates) == (6, 3)
    other, its_model, its_optimizer, its_runtime = make()
    other.load_state(str(tmp_path))
    assert its_runtime.step == 3
    assert train(other, its_model, its_optimizer, 6, 12) == expected


def test_lightning_trains_sparsely_and_a_resumed_training_ends_alike(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from padst_compile.integrations.lightning import PadstCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]  # imported above
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))

        def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
            return self.layers(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    inputs: Any = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(inputs, batch_size=4)  # five steps an epoch: Lightning resumes plain loaders there
    seen: dict[str, Any] = {}

    class Look(lightning.Callback):  # type: ignore[misc, name-defined]  # imported above
        def on_train_batch_end(self, trainer: Any, *given: Any) -> None:
            seen.update({name: value.item() for name, value in trainer.callback_metrics.items()})

    def fit(name: str, steps: int, resume: Path | None = None) -> Any:
        torch.manual_seed(0)
        spec = padst.SparsitySpec(padst.Block(8), sparsity=0.5, permutation="learned")
        module = padst.sparsify(Module(), spec)
        learned = padst.LearnedPermutation("autoshuffle", deadline=0.7)
        config = padst.DSTConfig(interval=2, end=1.0, total_steps=10, check_invariants=True, permutation=learned)
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[
                PadstCallback(lambda _: config),
                Look(),
                lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / name, every_n_train_steps=5, save_top_k=-1),
            ],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=resume)
        return module

    whole = fit("whole", 10)
    assert seen["padst/updates"] == 5
    assert not any(layer.soft is not None for _, layer in sparse_layers(whole))
    (checkpoint,) = (tmp_path / "whole").glob("*step=5*")
    resumed = fit("resumed", 10, checkpoint)
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
