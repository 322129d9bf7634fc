"""Runs one planned step: packs pending tokens, writes their KV into pages, attends over the pages.

Read Runner.forward -> _pack -> hidden. The weights are the trainer's own parameters, never copied.
Python's share of a step grows with the number of sequences, not of tokens: each sequence's token
ids and page numbers are copied in one go, and NumPy computes all positions and slots at once. On a
CPU a whole layer is one call of C++. At one token a step, calling a layer's ops one by one would
cost Python a quarter of the time.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from socpo_fast.device import upload
from socpo_fast.engine.sequence import Sequence, Step
from socpo_fast.model.decoder import Decoder, Layer, computing_dtype, has_hooks
from socpo_fast.ops._impl import pick_impl
from socpo_fast.ops.paged_attention import paged_attention_op
from socpo_fast.ops.prefix_groups import prefix_groups
from socpo_fast.ops.rotary import Rope
from socpo_fast.ops.rotary_write import rotary_write_op


class Runner:
    """The KV cache's tensors, and the forward of a student over them."""

    def __init__(
        self,
        student: Decoder,
        *,
        num_pages: int,
        page_size: int,
        cascade: bool,
        attention: str,
        min_memory_bytes: int = 0,
        stream_priority: int | None = None,
    ):
        config = student.config
        weight = student.lm_head.weight
        self.student = student
        self.page_size = page_size
        self.device = weight.device
        self.cascade = cascade
        # Stands for the queries, by whose device and dtype the implementations are chosen.
        queries = weight.new_empty(0, dtype=computing_dtype(weight))
        self.stream: torch.cuda.Stream | None = None
        if stream_priority is not None and self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device, priority=stream_priority)
        self.attention_impl = pick_impl("paged_attention", attention, queries)
        self.rotary_impl = pick_impl("rotary_write", "auto", queries)
        # Whether decode steps carry groups_BG. Only the Triton kernel reads it.
        self.uses_prefix_groups = cascade and self.attention_impl == "triton"
        shape = (2, config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim)
        kv_bytes = num_pages * self.page_bytes(student, page_size)
        num_bytes = max(kv_bytes, min_memory_bytes)
        try:
            self.memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            # torch's message spans several lines and names no setting. Ours names the one to lower.
            setting = "kv_cache_gib" if kv_bytes >= min_memory_bytes else "GiB of min_memory_bytes"
            raise ValueError(
                f"Engine: {setting} must fit into memory, got {num_bytes / 2**30:.4g}; lower it"
            ) from error
        # Views that are never replaced, because captured CUDA graphs hold their addresses. A page
        # number means the same page of every layer, of keys and of values:
        #     memory    | k: layer 0 | k: layer 1 | .. | v: layer 0 | v: layer 1 | .. |
        #     layer     | page 0: S tokens x K heads x E | page 1 | .. | page P - 1 |
        self.k_cache_LPSKE, self.v_cache_LPSKE = (
            self.memory[:kv_bytes].view(weight.dtype).view(shape)
        )
        self.caches = list(zip(self.k_cache_LPSKE, self.v_cache_LPSKE, strict=True))
        self.bind_weights()

    def bind_weights(self) -> None:
        """Looks up the student's parameters, for layers that run as one call of C++.

        layer_weights is empty where layers must run op by op. The lookup is repeated whenever the
        weights change, in case a parameter was replaced.
        """
        is_fused = self.attention_impl == self.rotary_impl == "cpp"
        layers = [layer for layer in self.student.layers if isinstance(layer, Layer)]
        self.layer_weights = [fused_weights(layer) for layer in layers] if is_fused else []
        self.layer_modules = list(self.student.layers.modules())

    @staticmethod
    def page_bytes(student: Decoder, page_size: int) -> int:
        """Returns the bytes of one page: keys and values of page_size tokens in all layers."""
        config = student.config
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return per_token * page_size * student.lm_head.weight.element_size()

    def pages_for(self, num_tokens: int) -> int:
        """Returns the number of pages that num_tokens tokens fill, the last one perhaps partly."""
        return -(-num_tokens // self.page_size)

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Makes the engine's stream current, if it has one, after the caller's work so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    @torch.no_grad()
    def forward(self, plan: list[tuple[Sequence, int]]) -> Tensor:
        """Forwards the planned tokens; returns each sequence's last hidden state, [B, D]."""
        step = self._pack(plan)
        # Row cu_seqlens_q[b + 1] - 1 is the last token of sequence b.
        return self.hidden(step)[step.cu_seqlens_q[1:].long() - 1]

    def hidden(self, step: Step) -> Tensor:
        """Writes the tokens' KV into pages and returns their hidden states, [T, D]."""
        if self.layer_weights and not has_hooks(self.layer_modules):
            return self._hidden_by_layer(step)

        def attend(layer_idx: int, qkv_TXE: Tensor, rope: Rope) -> Tensor:
            # The registered ops themselves, without checks. The engine made the step's tensors, and
            # a check would read them back from the device in every layer.
            caches = self.caches[layer_idx]
            return paged_attention_op(
                rotary_write_op(qkv_TXE, *rope, *caches, step.slots_T, self.rotary_impl),
                *caches,
                step.block_table_BM,
                step.seq_lens_B,
                step.cu_seqlens_q,
                step.max_seqlen_q,
                step.max_seqlen_k,
                step.groups_BG,
                self.student.config.head_dim**-0.5,
                self.cascade,
                self.attention_impl,
            )

        return self.student(step.token_ids_T, step.positions_T, attend)

    def _hidden_by_layer(self, step: Step) -> Tensor:
        """Computes `hidden` with one call of C++ a layer, without gradients.

        csrc/decoder_layer.cpp has the same ops in the same order as Layer in model/decoder.py.
        """
        student = self.student
        x_TD, cos_sin = student.first_layer_inputs(step.token_ids_T, step.positions_T)
        delta_TD = None
        for weights, caches in zip(self.layer_weights, self.caches, strict=True):
            x_TD, delta_TD = torch.ops.socpo.decoder_layer(
                x_TD,
                delta_TD,
                weights,
                student.config.rms_norm_eps,
                *cos_sin,
                *caches,
                step.slots_T,
                step.block_table_BM,
                step.seq_lens_B,
                step.cu_seqlens_q,
                student.config.head_dim**-0.5,
                self.cascade,
            )
        # A layer leaves its last delta to the next norm, which adds it. So does the final norm.
        return student.norm(delta_TD, x_TD)[0]

    def copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """Copies whole pages, (from, to) each, in every layer."""
        if copies:
            with self.on_stream():
                # Copied at once: no page is both read and written here, since a target was free.
                sources, targets = upload(torch.tensor(copies), self.device).unbind(1)
                self.k_cache_LPSKE[:, targets] = self.k_cache_LPSKE[:, sources]
                self.v_cache_LPSKE[:, targets] = self.v_cache_LPSKE[:, sources]

    def _pack(self, plan: list[tuple[Sequence, int]]) -> Step:
        """Packs the planned tokens of all sequences into the tensors of a Step.

        For three sequences with 4, 1 and 3 planned tokens, of which 0, 9 and 8 are cached:

            rows_T        0 0 0 0  1  2  2  2      the sequence of each token
            positions_T   0 1 2 3  9  8  9 10      its position in that sequence
            num_new_B     4        1  3
            ends_B        4        5  8            cumulative; with a 0 before it, cu_seqlens_q
        """
        token_ids: list[int] = []
        planned_B2 = np.array([(sequence.num_cached, num_tokens) for sequence, num_tokens in plan])
        table_BM = np.zeros(
            (len(plan), max(len(sequence.pages) for sequence, _ in plan)), dtype=np.int32
        )
        for row, (sequence, num_tokens) in enumerate(plan):
            token_ids += sequence.token_ids[sequence.num_cached : sequence.num_cached + num_tokens]
            table_BM[row, : len(sequence.pages)] = sequence.pages
        num_cached_B, num_new_B = planned_B2.T
        ends_B = num_new_B.cumsum()
        rows_T = np.arange(len(plan)).repeat(num_new_B)
        # A sequence's tokens start at row ends - num_new and at position num_cached.
        positions_T = np.arange(len(token_ids)) + (num_cached_B - ends_B + num_new_B)[rows_T]
        slots_T = table_BM[rows_T, positions_T // self.page_size].astype(np.int64) * self.page_size
        int64_3T = np.stack((token_ids, positions_T, slots_T + positions_T % self.page_size))
        seq_lens_B = num_cached_B + num_new_B
        cu_seqlens_q = np.insert(ends_B, 0, 0)
        # One upload for each dtype, because each upload costs the host time, however small it is.
        int32s = np.concatenate((table_BM.ravel(), seq_lens_B, cu_seqlens_q)).astype(np.int32)
        token_ids_T, positions_T, slots_T = upload(torch.from_numpy(int64_3T), self.device)
        sizes = [table_BM.size, len(plan), len(plan) + 1]
        block_table, seq_lens, cu_seqlens = upload(torch.from_numpy(int32s), self.device).split(
            sizes
        )
        groups_BG = None
        # Groups are for decode steps only, in which every sequence has one query token.
        if self.uses_prefix_groups and num_new_B.max() == 1:
            groups_BG = upload(
                torch.from_numpy(prefix_groups(table_BM, seq_lens_B, self.page_size)), self.device
            )
        return Step(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            slots_T=slots_T,
            block_table_BM=block_table.view(table_BM.shape),
            seq_lens_B=seq_lens,
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=int(num_new_B.max()),
            max_seqlen_k=int(seq_lens_B.max()),
            groups_BG=groups_BG,
        )


def fused_weights(layer: Layer) -> list[Tensor | None]:
    """Returns a layer's parameters in the order that torch.ops.socpo.decoder_layer expects."""
    attention = layer.attention
    mlp = layer.mlp
    norms = [norm if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm)]
    qkv, o, gate_up, down = (
        [linear.weight, linear.bias]
        for linear in (attention.qkv, attention.o, mlp.gate_up, mlp.down)
    )
    return [layer.attention_norm.weight, *qkv, *norms, *o, layer.mlp_norm.weight, *gate_up, *down]
