"""Several tokens of every running sequence without a word from the host: what a GPU needs to decode
at full speed.

The state stands in tensors of fixed place. A round reads the tokens sampled last, writes their KV,
samples the next ones and moves the state on; rounds follow each other on the device and the host
reads them all at once. On a GPU a round is captured as a CUDA graph for each number of sequences,
rounded up to a power of two, for the longest context that these may come to, and with filters or
without. A round is made of the ops of an ordinary step and draws the same tokens; what a sequence
samples behind its end is thrown away.
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
    """Room for max_running sequences and max_rounds rounds.

    ints_4R [4, R] int64: token id, its position (-1: no sequence here), noise key, number sampled.
    place_3R [3, R] int64: of the tokens of a round, position, slot and the key of what is drawn
    behind them; places_N3R: of all rounds of a launch. drawn_3R [3, R] fp64: token id, log-prob,
    kept mass of the last round; rounds_WN3R: those of all rounds, for two launches in turn: one is
    read while the other is under way.
    """

    def __init__(self, runner: Runner, *, max_running: int, max_rounds: int):
        self.runner = runner
        device = runner.device
        self.ints_4R = torch.zeros(4, max_running, dtype=torch.int64, device=device)
        self.groups_RG = torch.zeros(max_running, GROUP_WIDTH, dtype=torch.int32, device=device)
        self.settings_4R = torch.zeros(4, max_running, device=device)
        self.place_3R = torch.zeros(3, max_running, dtype=torch.int64, device=device)
        self.places_N3R = torch.zeros(max_rounds, 3, max_running, dtype=torch.int64, device=device)
        self.count_N1 = torch.arange(max_rounds, device=device)[:, None]
        self.cu_seqlens = torch.arange(max_running + 1, dtype=torch.int32, device=device)
        self.drawn_3R = torch.zeros(3, max_running, dtype=torch.float64, device=device)
        self.rounds_WN3R = torch.zeros(
            2, max_rounds, 3, max_running, dtype=torch.float64, device=device
        )
        self.max_running = max_running
        self.max_pages = runner.pages_for(runner.student.config.max_position_embeddings)
        self.captures = device.type == "cuda"
        self._tables: dict[int, Tensor] = {}  # by pages a row, so that the rows in use lie densely
        self._graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] = {}
        self._stream: torch.cuda.Stream | None = None  # of captures
        self._window = 0

    @torch.no_grad()
    def launch(self, sequences: list[Sequence], num_rounds: int, *, is_ahead: bool) -> Readback:
        """Launches rounds; what they draw, [num_rounds, 3, len(sequences)]: token_id, logprob,
        kept_mass.

        The sequences' pages have room for all rounds. is_ahead: the launch before was of the same
        sequences and has not been read, so the state that it leaves is the one to go on from.
        """
        longest = max(s.attempt_start + s.params.max_new_tokens for s in sequences)
        rows = self.num_rows(len(sequences))
        pages = self._num_pages(longest)
        size = rows, pages, any(s.params.is_filtered for s in sequences)
        graph = self._graph(*size) if self.captures else None
        if is_ahead:
            self._end_rows([row for row, s in enumerate(sequences) if not s.is_live])
        else:
            self._fill_state(sequences, rows)
        self._fill_table(sequences, rows, pages)
        self._window = 1 - self._window
        rounds_N3R = self.rounds_WN3R[self._window]
        self._set_places(rows, pages, num_rounds)
        for round_idx in range(num_rounds):
            self.place_3R[:, :rows] = self.places_N3R[round_idx, :, :rows]
            graph.replay() if graph is not None else self._round(*size)
            rounds_N3R[round_idx].copy_(self.drawn_3R)
        return Readback(rounds_N3R[:num_rounds, :, : len(sequences)])

    @torch.no_grad()
    def prepare(self, max_tokens: int) -> None:
        """Captures the rounds of every number of sequences for contexts of up to max_tokens."""
        for power in range((self.max_running - 1).bit_length() + 1 if self.captures else 0):
            for is_filtered in (False, True):  # training, and evaluations
                self._graph(self.num_rows(1 << power), self._num_pages(max_tokens), is_filtered)

    def num_rows(self, num_sequences: int) -> int:
        """Rows of a round for so many sequences: a power of two where rounds are captured."""
        rows = 1 << (num_sequences - 1).bit_length() if self.captures else num_sequences
        return min(rows, self.max_running)

    def _num_pages(self, num_tokens: int) -> int:
        """Pages a row of the table has for contexts of up to so many tokens: a power of two."""
        pages = 1 << (self.runner.pages_for(num_tokens) - 1).bit_length()
        return min(pages, self.max_pages)

    def _fill_state(self, sequences: list[Sequence], rows: int) -> None:
        device = self.runner.device
        ints_4R = torch.zeros(4, rows, dtype=torch.int64)
        ints_4R[1] = -1
        if sequences:
            state = [(s.token_ids[-1], s.num_cached, s.noise_key, s.num_sampled) for s in sequences]
            ints_4R[:, : len(sequences)] = torch.tensor(state).t()
            self.settings_4R[:, : len(sequences)] = settings_of(sequences, device)
        self.ints_4R[:, :rows] = upload(ints_4R, device)

    def _end_rows(self, rows: list[int]) -> None:
        """These rows have no sequence any more."""
        if rows:
            self.ints_4R[1, upload(torch.tensor(rows), self.runner.device)] = -1

    def _fill_table(self, sequences: list[Sequence], rows: int, pages: int) -> None:
        table_RM = np.zeros((rows, pages), dtype=np.int32)
        for row, sequence in enumerate(sequences):
            table_RM[row, : len(sequence.pages)] = sequence.pages
        self._table(pages)[:rows] = upload(torch.from_numpy(table_RM), self.runner.device)
        if self.runner.names_groups:
            # Rows without a sequence share nothing. Whole pages stay whole in all rounds.
            lengths = [s.num_cached if s.is_live else 0 for s in sequences]
            seq_lens_R = np.array(lengths + [0] * (rows - len(lengths)))
            groups_RG = prefix_groups(table_RM, seq_lens_R, self.runner.page_size)
            self.groups_RG[:rows] = upload(torch.from_numpy(groups_RG), self.runner.device)

    def _table(self, pages: int) -> Tensor:
        if pages not in self._tables:
            self._tables[pages] = self.ints_4R.new_zeros(
                (self.max_running, pages), dtype=torch.int32
            )
        return self._tables[pages]

    def _set_places(self, rows: int, pages: int, num_rounds: int) -> None:
        """What the next rounds read beside the tokens themselves, and the state that they leave."""
        size = self.runner.page_size
        table_RM = self._table(pages)[:rows]
        _, positions_R, noise_R, num_sampled_R = self.ints_4R[:, :rows]
        count_N1 = self.count_N1[:num_rounds]
        is_live_R = positions_R >= 0
        at_NR = torch.where(is_live_R, positions_R + count_N1, 0)
        page_NR = table_RM.gather(1, (at_NR // size).t()).t()
        slots_NR = torch.where(is_live_R, page_NR.long() * size + at_NR % size, -1)
        keys_NR = next_keys(noise_R, num_sampled_R + count_N1)
        self.places_N3R[:num_rounds, :, :rows] = torch.stack((at_NR, slots_NR, keys_NR), 1)
        positions_R.add_(is_live_R * num_rounds)
        num_sampled_R.add_(num_rounds)

    def _round(self, rows: int, pages: int, is_filtered: bool) -> None:
        token_ids_R = self.ints_4R[0, :rows]
        positions_R, slots_R, keys_R = self.place_3R[:, :rows]
        step = Step(
            token_ids_T=token_ids_R,
            positions_T=positions_R,
            slots_T=slots_R,
            block_table_BM=self._table(pages)[:rows],
            seq_lens_B=(positions_R + 1).int(),
            cu_seqlens_q=self.cu_seqlens[: rows + 1],
            max_seqlen_q=1,
            max_seqlen_k=pages * self.runner.page_size,
            groups_BG=self.groups_RG[:rows] if self.runner.names_groups else None,
        )
        hidden_RD = self.runner.hidden(step)
        settings_4R = self.settings_4R[:, :rows]
        self.drawn_3R[:, :rows] = draw(
            self.runner.student, hidden_RD, keys_R, settings_4R, is_filtered
        )
        token_ids_R.copy_(self.drawn_3R[0, :rows])

    def _graph(self, rows: int, pages: int, is_filtered: bool) -> torch.cuda.CUDAGraph:
        """The captured round, made at its first use: with no live sequence a round writes no KV.

        Captured on the engine's own stream where it has one, whose priority the graph keeps.
        torch.cuda.graph would stop the whole card, the teacher's steps too.
        """
        size = rows, pages, is_filtered
        if size not in self._graphs:
            device = self.runner.device
            with torch.cuda.device(device):  # a capture belongs to the current device
                self._stream = self._stream or self.runner.stream or torch.cuda.Stream(device)
                self._stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(self._stream):
                    self._fill_state([], rows)
                    self._fill_table([], rows, pages)
                    self._set_places(rows, pages, 1)
                    self.place_3R[:, :rows] = self.places_N3R[0, :, :rows]
                    self._round(*size)  # compiles and fills caches, which a capture may not
                    # One pool for all graphs, since no two rounds run at once.
                    pool = next((graph.pool() for graph in self._graphs.values()), None)
                    graph = torch.cuda.CUDAGraph()
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        self._round(*size)
                    finally:
                        graph.capture_end()
                torch.cuda.current_stream(device).wait_stream(self._stream)
            self._graphs[size] = graph
        return self._graphs[size]
