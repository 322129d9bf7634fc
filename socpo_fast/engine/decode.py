"""Several tokens of every running sequence without a word from the host: what a GPU needs to decode at full speed.

The state stands in tensors of fixed place. A round reads the tokens sampled last, writes their KV, samples the next
ones and moves the state on; rounds follow each other on the device and the host reads them all at once. On a GPU a
round is captured as a CUDA graph for each number of sequences and pages, rounded up to powers of two. A round is made
of the ops of an ordinary step and draws the same tokens; what a sequence samples behind its end is thrown away.
"""

import numpy as np
import torch

from socpo_fast.engine.runner import Runner
from socpo_fast.engine.sampler import draw, settings_of
from socpo_fast.engine.sequence import Sequence, Step


class DecodeLoop:
    """Room for max_running sequences and max_rounds rounds.

    ints_4R [4, R] int64: token id, its position (-1: no sequence here), noise key, number sampled.
    drawn_3R [3, R] fp64: token id, log-prob, kept mass of the last round; rounds_N3R those of all rounds.
    """

    def __init__(self, runner: Runner, *, max_running: int, max_rounds: int):
        self.runner, device = runner, runner.device
        num_pages = -(-runner.student.config.max_position_embeddings // runner.page_size)
        self.ints_4R = torch.zeros(4, max_running, dtype=torch.int64, device=device)
        self.table_RM = torch.zeros(max_running, num_pages, dtype=torch.int32, device=device)
        self.settings_4R = torch.zeros(4, max_running, device=device)
        self.drawn_3R = torch.zeros(3, max_running, dtype=torch.float64, device=device)
        self.rounds_N3R = torch.zeros(max_rounds, 3, max_running, dtype=torch.float64, device=device)
        self.captures = device.type == "cuda"
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._capture_stream: torch.cuda.Stream | None = None

    @torch.no_grad()
    def run(self, sequences: list[Sequence], num_rounds: int) -> list[list[list[float]]]:
        """token_id, logprob, kept_mass of each sequence, for each round.

        The sequences' pages have room for all rounds.
        """
        rows, pages = len(sequences), max(len(sequence.pages) for sequence in sequences)
        is_filtered, graph = any(s.params.is_filtered for s in sequences), None
        if self.captures:
            # the size that is captured: powers of two, as far as there is room
            rows = min(1 << (rows - 1).bit_length(), self.table_RM.shape[0])
            pages = min(1 << (pages - 1).bit_length(), self.table_RM.shape[1])
            graph = None if is_filtered else self._graph(rows, pages)  # filtered draws need shapes that depend on data
        self._fill(sequences, rows, pages)
        for round_idx in range(num_rounds):
            graph.replay() if graph is not None else self._round(rows, pages, is_filtered)
            self.rounds_N3R[round_idx].copy_(self.drawn_3R)
        return self.rounds_N3R[:num_rounds, :, : len(sequences)].transpose(1, 2).tolist()

    def _fill(self, sequences: list[Sequence], rows: int, pages: int) -> None:
        ints_4R, table_RM = np.zeros((4, rows), dtype=np.int64), np.zeros((rows, pages), dtype=np.int32)
        ints_4R[1] = -1
        for row, s in enumerate(sequences):
            ints_4R[:, row] = s.token_ids[-1], s.num_cached, s.noise_key, s.num_sampled
            table_RM[row, : len(s.pages)] = s.pages
        self.ints_4R[:, :rows] = torch.from_numpy(ints_4R)
        self.table_RM[:rows, :pages] = torch.from_numpy(table_RM)
        self.settings_4R[:, : len(sequences)] = settings_of(sequences, self.runner.device)

    def _round(self, rows: int, pages: int, is_filtered: bool = False) -> None:
        size, device = self.runner.page_size, self.runner.device
        token_ids_R, positions_R, noise_R, num_sampled_R = self.ints_4R[:, :rows]
        table_RM, is_live_R = self.table_RM[:rows, :pages].contiguous(), positions_R >= 0
        at_R = positions_R.clamp(min=0)
        slots_R = table_RM.gather(1, (at_R // size)[:, None])[:, 0].long() * size + at_R % size
        step = Step(
            token_ids_T=token_ids_R,
            positions_T=at_R,
            slots_T=torch.where(is_live_R, slots_R, -1),
            block_table_BM=table_RM,
            seq_lens_B=(at_R + 1).int(),
            cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32, device=device),
            max_seqlen_q=1,
            max_seqlen_k=pages * size,
        )
        self.drawn_3R[:, :rows] = draw(
            self.runner.student,
            self.runner.hidden(step),
            noise_R,
            num_sampled_R,
            self.settings_4R[:, :rows],
            is_filtered,
        )
        token_ids_R.copy_(self.drawn_3R[0, :rows])
        positions_R.add_(is_live_R)
        num_sampled_R.add_(1)

    def _graph(self, rows: int, pages: int) -> torch.cuda.CUDAGraph:
        """The captured round, made at its first use: with no live sequence a round writes no KV."""
        if (rows, pages) not in self._graphs:
            device = self.runner.device
            # A capture belongs to the current device, which need not be the runner's. The stream is
            # the loop's own: torch keeps a single one, of the device that captured first.
            with torch.cuda.device(device):
                self._capture_stream = self._capture_stream or torch.cuda.Stream(device)
                self._fill([], rows, pages)
                self._round(rows, pages)  # compiles and fills caches, which a capture may not
                torch.cuda.synchronize(device)
                # One pool for all graphs, since no two rounds run at once.
                pool = next((graph.pool() for graph in self._graphs.values()), None)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=self._capture_stream):
                    self._round(rows, pages)
            self._graphs[rows, pages] = graph
        return self._graphs[rows, pages]
