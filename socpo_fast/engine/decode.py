"""Decodes several tokens of every running sequence in one launch, without waiting for the host.

Read DecodeLoop.launch, then _set_round_inputs and run_round, then graph_for.

    host      launch: fill the state, the block table and the inputs of all rounds
    device    [ round 0 ][ round 1 ] .. [ round N - 1 ]
                   each: forward the last tokens, write their KV, draw the next ones
    host      read the draws of all N rounds at once

The state is in tensors whose addresses never change, so that a captured CUDA graph can read them.
On a GPU a round is captured once for each number of rows (a power of two), each width of the block
table (the longest context that the sequences can reach), and with or without filters. A round uses
the ops of an ordinary step and draws the same tokens. What it draws behind a sequence's end is
dropped.
"""

import numpy as np
import torch
from torch import Tensor

from socpo_fast.device import Readback, upload
from socpo_fast.engine.runner import Runner
from socpo_fast.engine.sampler import draw, settings_of
from socpo_fast.engine.sequence import Sequence, Step
from socpo_fast.ops import next_keys
from socpo_fast.ops.prefix_groups import GROUP_WIDTH, prefix_groups


class DecodeLoop:
    """Decode rounds for up to max_running sequences, up to max_rounds of them in a launch.

    R rows, one for each sequence; N rounds. A row without a live sequence has position -1.

        ints_4R           [4, R] int64        state: last token id, its position, noise key,
                                              num sampled
        inputs_3R         [3, R] int64        of a round: position, slot, key of its draw
        round_inputs_N3R  [N, 3, R] int64     the same for all rounds of a launch
        drawn_3R          [3, R] fp64         draws of the last round: token id, logprob, kept mass
        rounds_WN3R       [2, N, 3, R] fp64   draws of all rounds, one half for every other launch:
                                              the host reads one while the device writes the other
    """

    def __init__(self, runner: Runner, *, max_running: int, max_rounds: int):
        self.runner = runner
        device = runner.device
        self.ints_4R = torch.zeros(4, max_running, dtype=torch.int64, device=device)
        self.groups_RG = torch.zeros(max_running, GROUP_WIDTH, dtype=torch.int32, device=device)
        self.settings_4R = torch.zeros(4, max_running, device=device)
        self.inputs_3R = torch.zeros(3, max_running, dtype=torch.int64, device=device)
        self.round_inputs_N3R = torch.zeros(
            max_rounds, 3, max_running, dtype=torch.int64, device=device
        )
        self.round_idx_N1 = torch.arange(max_rounds, device=device)[:, None]
        self.cu_seqlens = torch.arange(max_running + 1, dtype=torch.int32, device=device)
        self.drawn_3R = torch.zeros(3, max_running, dtype=torch.float64, device=device)
        self.rounds_WN3R = torch.zeros(
            2, max_rounds, 3, max_running, dtype=torch.float64, device=device
        )
        self.max_running = max_running
        self.max_pages = runner.pages_for(runner.student.config.max_position_embeddings)
        self.captures = device.type == "cuda"
        # Block tables by width. One table of the largest width would leave gaps between short rows.
        self._tables: dict[int, Tensor] = {}
        self.graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] = {}
        self._stream: torch.cuda.Stream | None = None  # of captures
        self._window = 0  # the half of rounds_WN3R that the last launch writes to

    @torch.no_grad()
    def launch(self, sequences: list[Sequence], num_rounds: int, *, is_ahead: bool) -> Readback:
        """Launches decode rounds; returns their draws [num_rounds, 3, len(sequences)] on their way.

        Args:
            sequences:  their pages have room for the tokens of all rounds.
            num_rounds: at most max_rounds.
            is_ahead:   the previous launch had the same sequences and has not been read. So the
                        device's state is ahead of the host's, and the rounds start from it.
        """
        max_tokens = max(s.attempt_start + s.params.max_new_tokens for s in sequences)
        num_rows = self.num_rows(len(sequences))
        num_pages = self._num_pages(max_tokens)
        graph_key = num_rows, num_pages, any(s.params.is_filtered for s in sequences)
        # First, because a capture overwrites the state.
        graph = self.graph_for(*graph_key) if self.captures else None
        if is_ahead:
            self._end_rows([row for row, s in enumerate(sequences) if not s.is_live])
        else:
            self._fill_state(sequences, num_rows)
        self._fill_table(sequences, num_rows, num_pages)
        self._window = 1 - self._window
        rounds_N3R = self.rounds_WN3R[self._window]
        self._set_round_inputs(num_rows, num_pages, num_rounds)
        for round_idx in range(num_rounds):
            self.inputs_3R[:, :num_rows] = self.round_inputs_N3R[round_idx, :, :num_rows]
            graph.replay() if graph is not None else self.run_round(*graph_key)
            rounds_N3R[round_idx].copy_(self.drawn_3R)
        return Readback(rounds_N3R[:num_rounds, :, : len(sequences)])

    @torch.no_grad()
    def prepare(self, max_tokens: int) -> None:
        """Captures the rounds of every number of rows, for contexts of up to max_tokens tokens."""
        for power in range((self.max_running - 1).bit_length() + 1 if self.captures else 0):
            for is_filtered in (False, True):  # training has no filters, evaluations may
                self.graph_for(self.num_rows(1 << power), self._num_pages(max_tokens), is_filtered)

    def num_rows(self, num_sequences: int) -> int:
        """Returns the rows of a round with num_sequences sequences."""
        # Captured rounds have a power of two: a few graphs serve every number of sequences.
        num_rows = 1 << (num_sequences - 1).bit_length() if self.captures else num_sequences
        return min(num_rows, self.max_running)

    def _num_pages(self, num_tokens: int) -> int:
        """Returns the width of the block table for contexts of num_tokens: a power of two."""
        num_pages = 1 << (self.runner.pages_for(num_tokens) - 1).bit_length()
        return min(num_pages, self.max_pages)

    def _fill_state(self, sequences: list[Sequence], num_rows: int) -> None:
        """Uploads the sequences' state; rows behind the last sequence get position -1."""
        device = self.runner.device
        ints_4R = torch.zeros(4, num_rows, dtype=torch.int64)
        ints_4R[1] = -1
        if sequences:
            state = [(s.token_ids[-1], s.num_cached, s.noise_key, s.num_sampled) for s in sequences]
            ints_4R[:, : len(sequences)] = torch.tensor(state).t()
            self.settings_4R[:, : len(sequences)] = settings_of(sequences, device)
        self.ints_4R[:, :num_rows] = upload(ints_4R, device)

    def _end_rows(self, rows: list[int]) -> None:
        """Marks rows whose sequences have ended, so that later rounds write no KV for them."""
        if rows:
            self.ints_4R[1, upload(torch.tensor(rows), self.runner.device)] = -1

    def _fill_table(self, sequences: list[Sequence], num_rows: int, num_pages: int) -> None:
        """Uploads the block table and, if the kernel uses them, the groups that share pages."""
        table_RM = np.zeros((num_rows, num_pages), dtype=np.int32)
        for row, sequence in enumerate(sequences):
            table_RM[row, : len(sequence.pages)] = sequence.pages
        self._table(num_pages)[:num_rows] = upload(torch.from_numpy(table_RM), self.runner.device)
        if self.runner.uses_prefix_groups:
            # Computed once for all rounds: pages that are full now stay full. Rows without a live
            # sequence have length 0, so they share nothing.
            seq_lens = [s.num_cached if s.is_live else 0 for s in sequences]
            seq_lens_R = np.array(seq_lens + [0] * (num_rows - len(seq_lens)))
            groups_RG = prefix_groups(table_RM, seq_lens_R, self.runner.page_size)
            self.groups_RG[:num_rows] = upload(torch.from_numpy(groups_RG), self.runner.device)

    def _table(self, num_pages: int) -> Tensor:
        """Returns the block table of this width, always the same tensor, for captured graphs."""
        if num_pages not in self._tables:
            self._tables[num_pages] = self.ints_4R.new_zeros(
                (self.max_running, num_pages), dtype=torch.int32
            )
        return self._tables[num_pages]

    def _set_round_inputs(self, num_rows: int, num_pages: int, num_rounds: int) -> None:
        """Computes all inputs of the next rounds but the token ids, and advances the state.

        Only token ids depend on what earlier rounds draw. Positions, slots and noise keys are known
        ahead, so they are computed for all rounds at once instead of in every round.
        """
        page_size = self.runner.page_size
        table_RM = self._table(num_pages)[:num_rows]
        _, positions_R, noise_R, num_sampled_R = self.ints_4R[:, :num_rows]
        round_idx_N1 = self.round_idx_N1[:num_rounds]
        is_live_R = positions_R >= 0
        # A row without a sequence computes at position 0, which is always valid, and has slot -1,
        # to which no KV is written.
        positions_NR = torch.where(is_live_R, positions_R + round_idx_N1, 0)
        pages_NR = table_RM.gather(1, (positions_NR // page_size).t()).t()
        slots_NR = torch.where(
            is_live_R, pages_NR.long() * page_size + positions_NR % page_size, -1
        )
        keys_NR = next_keys(noise_R, num_sampled_R + round_idx_N1)
        self.round_inputs_N3R[:num_rounds, :, :num_rows] = torch.stack(
            (positions_NR, slots_NR, keys_NR), 1
        )
        positions_R.add_(is_live_R * num_rounds)
        num_sampled_R.add_(num_rounds)

    def run_round(self, num_rows: int, num_pages: int, is_filtered: bool) -> None:
        """Computes one round: forwards the last tokens and draws the next ones over them."""
        token_ids_R = self.ints_4R[0, :num_rows]
        positions_R, slots_R, keys_R = self.inputs_3R[:, :num_rows]
        step = Step(
            token_ids_T=token_ids_R,
            positions_T=positions_R,
            slots_T=slots_R,
            block_table_BM=self._table(num_pages)[:num_rows],
            seq_lens_B=(positions_R + 1).int(),
            cu_seqlens_q=self.cu_seqlens[: num_rows + 1],
            max_seqlen_q=1,
            # The most that the table can hold: a captured number must be right for all lengths.
            max_seqlen_k=num_pages * self.runner.page_size,
            groups_BG=self.groups_RG[:num_rows] if self.runner.uses_prefix_groups else None,
        )
        hidden_RD = self.runner.hidden(step)
        settings_4R = self.settings_4R[:, :num_rows]
        self.drawn_3R[:, :num_rows] = draw(
            self.runner.student, hidden_RD, keys_R, settings_4R, is_filtered
        )
        token_ids_R.copy_(self.drawn_3R[0, :num_rows])  # the next round forwards these

    def graph_for(self, num_rows: int, num_pages: int, is_filtered: bool) -> torch.cuda.CUDAGraph:
        """Returns the CUDA graph of a round of this size, captured at its first use.

        It is captured on the engine's stream if there is one, because a graph keeps the priority of
        its stream. torch.cuda.graph is not used: it would synchronize the whole card, and with it
        the teacher's steps.
        """
        graph_key = num_rows, num_pages, is_filtered
        if graph_key not in self.graphs:
            device = self.runner.device
            with torch.cuda.device(device):  # a capture belongs to the current device
                self._stream = self._stream or self.runner.stream or torch.cuda.Stream(device)
                self._stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(self._stream):
                    # No live sequences: the warm-up round below must not write any KV.
                    self._fill_state([], num_rows)
                    self._fill_table([], num_rows, num_pages)
                    self._set_round_inputs(num_rows, num_pages, 1)
                    self.inputs_3R[:, :num_rows] = self.round_inputs_N3R[0, :, :num_rows]
                    # Compiles kernels and fills caches, which is not allowed during a capture.
                    self.run_round(*graph_key)
                    # One pool for all graphs, since no two rounds run at once.
                    pool = next((graph.pool() for graph in self.graphs.values()), None)
                    graph = torch.cuda.CUDAGraph()
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        self.run_round(*graph_key)
                    finally:
                        graph.capture_end()
                torch.cuda.current_stream(device).wait_stream(self._stream)
            self.graphs[graph_key] = graph
        return self.graphs[graph_key]
