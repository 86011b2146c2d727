"""Other people's trainers on the workload of gpu_step.py, with the weights that ours starts from.

Each is a function of (geometry, data, device, dtype, steps); it raises ImportError where its package is absent.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from preference import as_text
from step_workload import (
    BETA,
    BETAS,
    CLIP,
    EPS,
    LR,
    PAIRS_PER_BATCH,
    WEIGHT_DECAY,
    Geometry,
    Pack,
    Result,
    measure,
    n_learned,
    summary,
    synchronize,
)

from paralign.engine.backends import backend_of
from paralign.engine.config.model import ModelConfig
from paralign.engine.config.optimizer import OptimizerConfig
from paralign.engine.data.answers import Group
from paralign.engine.data.pack import pack_chats
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.training.build import DTYPES, random_weights, transformer_config, wrap_for_data_parallel
from paralign.engine.training.optim import Optimizer
from paralign.models import arch_from_hf, rules_for

SETTINGS = OptimizerConfig(
    lr=LR,
    lr_decay_style="constant",
    weight_decay=WEIGHT_DECAY,
    adam_beta1=BETAS[0],
    adam_beta2=BETAS[1],
    adam_eps=EPS,
    clip_grad=CLIP,
)


def has_flash(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None


def llama(geometry: Geometry, device: torch.device, dtype: str) -> Any:
    """transformers' model with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = {key: value for key, value in geometry.config().items() if key != "architectures"}
    attention = "flash_attention_2" if has_flash(device) else "sdpa"
    with device:
        model = LlamaForCausalLM(LlamaConfig(**keys, attn_implementation=attention))
    model.to(DTYPES[dtype])
    read = random_weights(arch_from_hf(geometry.config()), seed=0, dtype=DTYPES[dtype], device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name))
    return model


def require_liger(device: torch.device) -> None:
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("liger_kernel is not installed, or there is no GPU for it")


def transformers_sft(
    geometry: Geometry, packs: list[Pack], device: torch.device, dtype: str, steps: int
) -> Result:
    """The bare model under torch's fused AdamW, samples isolated by positions that restart."""
    model = llama(geometry, device, dtype)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    learned = torch.tensor(n_learned(packs), device=device)
    rows = []
    for pack in packs:
        row = {**joined(pack), "position_ids": [i for tokens, _ in pack for i in range(len(tokens))]}
        rows.append({name: torch.tensor([column], device=device) for name, column in row.items()})

    def train() -> float:
        optimizer.zero_grad()
        total = 0.0
        for row in rows:
            loss = model(**row, num_items_in_batch=learned).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return total

    return measure(train, steps, device)


def joined(pack: Pack) -> dict[str, list[int]]:
    """A pack as one row of transformers: its tokens, and labels that are not shifted."""
    return {
        "input_ids": [token for tokens, _ in pack for token in tokens],
        "labels": [
            token if i and is_learned else -100
            for tokens, mask in pack
            for i, (token, is_learned) in enumerate(zip(tokens, mask))
        ],
    }


def trl_sft(geometry: Geometry, packs: list[Pack], device: torch.device, dtype: str, steps: int) -> Result:
    """TRL's SFTTrainer, without padding, a pack a micro-batch; its own chunked head."""
    return _trl_sft(geometry, packs, device, dtype, steps, liger=False)


def trl_sft_with_liger(
    geometry: Geometry, packs: list[Pack], device: torch.device, dtype: str, steps: int
) -> Result:
    """The same with Liger's norm, SwiGLU, RoPE and head."""
    require_liger(device)
    return _trl_sft(geometry, packs, device, dtype, steps, liger=True)


def _trl_sft(
    geometry: Geometry, packs: list[Pack], device: torch.device, dtype: str, steps: int, *, liger: bool
) -> Result:
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = [{**joined(pack), "seq_lengths": [len(tokens) for tokens, _ in pack]} for pack in packs]
    _, tokenizer = as_text([])
    with tempfile.TemporaryDirectory() as directory:
        options = SFTConfig(
            **_options(directory, device, dtype, steps),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(packs),
            packing=True,
            padding_free=True,
            max_length=geometry.tokens_per_pack,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            use_liger_kernel=liger,
        )
        trainer = SFTTrainer(
            model=llama(geometry, device, dtype),
            args=options,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        return _timed(trainer, device)


def trl_dpo(
    geometry: Geometry, pairs: Sequence[Group], device: torch.device, dtype: str, steps: int
) -> Result:
    """TRL's DPOTrainer, padded batches, the reference computed beside the policy."""
    from trl import DPOConfig, DPOTrainer

    data, tokenizer = as_text(pairs)
    model = llama(geometry, device, dtype)
    with tempfile.TemporaryDirectory() as directory:
        options = DPOConfig(
            **_options(directory, device, dtype, steps),
            per_device_train_batch_size=PAIRS_PER_BATCH,
            gradient_accumulation_steps=-(-len(pairs) // PAIRS_PER_BATCH),
            beta=BETA,
            max_length=None,
        )
        trainer = DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model),
            args=options,
            train_dataset=data,
            processing_class=tokenizer,
        )
        return _timed(trainer, device)


def _options(directory: str, device: torch.device, dtype: str, steps: int) -> dict[str, Any]:
    return {
        "output_dir": directory,
        "max_steps": steps + 2,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": WEIGHT_DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "max_grad_norm": CLIP,
        "optim": "adamw_torch_fused",
        "bf16": dtype == "bf16",
        "use_cpu": device.type == "cpu",
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }


def _timed(trainer: Any, device: torch.device) -> Result:
    from transformers import PrinterCallback, TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            seconds.append(time.perf_counter() - self.began)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return summary(seconds, losses, device)


def megatron_sft(
    geometry: Geometry, packs: list[Pack], device: torch.device, dtype: str, steps: int
) -> Result:
    """megatron-core's GPTModel of its own local layers, as it runs without Transformer Engine and apex.

    Its attention knows packs by a mask alone and writes down all scores, which are computed again in the backward
    pass (`selective` recomputation), or they would not fit; its loss takes the logits of every row.
    """
    arch = arch_from_hf(geometry.config())
    keys = LayoutConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    sizes = {"global_batch_size": len(packs), "tokens_per_pack": geometry.tokens_per_pack}
    layout = resolve(keys, arch, world_size=1, **sizes)
    with open_mesh(layout, local_rank=0, seed=0) as mesh:
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.pipeline_parallel import get_forward_backward_func

        settings = ModelConfig(hf=Path(), dtype=dtype, kernels="reference")  # type: ignore[arg-type]
        config = transformer_config(arch, layout, settings, backend_of(settings))
        config.use_te_activation_func = False
        config.recompute_granularity, config.recompute_modules = "selective", ["core_attn"]
        with torch.device(mesh.device):
            model = GPTModel(
                config,
                get_gpt_layer_local_spec(normalization="RMSNorm"),
                vocab_size=geometry.vocabulary,
                max_sequence_length=geometry.tokens_per_pack,
                position_embedding_type="rope",
                rotary_base=500000,
            )
        rules = {rule.native: rule for rule in rules_for(arch)}
        read = random_weights(arch, seed=0, dtype=config.params_dtype, device=mesh.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(rules[name].slice(read, 0, 1))
        wrapped = wrap_for_data_parallel([model], config, layout)  # type: ignore[list-item]
        optimizer = Optimizer(wrapped, SETTINGS, layout, config.params_dtype)
        rows = [pack_chats(pack, geometry.tokens_per_pack, mesh.device) for pack in packs]
        learned = n_learned(packs)

        def forward(packs_left: Any, model: Any) -> tuple[torch.Tensor, Any]:
            pack = next(packs_left)
            rows_T = torch.arange(pack.tokens_T.shape[0], device=pack.tokens_T.device)
            segment_T = torch.searchsorted(pack.segments.cu_seqlens_q, rows_T, right=True)
            hidden = (segment_T[:, None] != segment_T) | (rows_T[:, None] < rows_T)
            labels = pack.labels_T.clamp(min=0)[None]
            losses = model(pack.tokens_T[None], rows_T[None], hidden[None, None], labels=labels)

            def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                total = (output[0] * (pack.labels_T >= 0)).sum() / learned
                return total, torch.zeros((), dtype=torch.int, device=total.device), total.detach()

            return losses, loss

        def train() -> float:
            optimizer.zero_grad()
            parts = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(rows),
                model=wrapped[0],
                num_microbatches=len(rows),
                seq_length=geometry.tokens_per_pack,
                micro_batch_size=1,
                forward_only=False,
            )
            optimizer.step(LR)
            return float(torch.stack(parts).sum())

        return measure(train, steps, device)
