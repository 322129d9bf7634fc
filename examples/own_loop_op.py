"""One op in a loop of your own: it replaces logits, log_softmax and the clipped policy loss.

Plain, compiled and under FSDP2, where each rank has rows of its own and a part of every weight:
torchrun --standalone --nproc-per-node 2 examples/own_loop_op.py
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from socpo_fast.ops import linear_policy_loss, next_token_rows
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR, questions


class Policy(torch.nn.Module):  # its forward ends in the loss: there FSDP has gathered the head
    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(STUDENT_DIR)

    def forward(self, ids, labels, advantages, num_loss_tokens):
        rows, targets, row_idx = next_token_rows(self.model.model(ids).last_hidden_state, labels)
        sampled = targets, None, advantages[:, 1:].flatten()  # None: no update since the sampling
        options = {"rows_N": row_idx, "temperature": 1.0, "num_loss_tokens": num_loss_tokens}
        return linear_policy_loss(rows, self.model.lm_head.weight, *sampled, **options).loss


def textbook_loss(policy, ids, labels, advantages, num_loss_tokens):
    targets = labels[:, 1:, None]
    logprobs = policy.model(ids).logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0))
    ratio = (logprobs - logprobs.detach()).exp()
    return -(ratio * advantages[:, 1:, None])[targets >= 0].sum() / num_loss_tokens


def main(backend="inductor"):
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    texts = zip(*[(q.text, q.reference_solution) for q in questions(0, 4)], strict=True)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_DIR)
    batch = tokenizer(*texts, padding=True, return_token_type_ids=True, return_tensors="pt")
    labels = batch["input_ids"].where(batch["token_type_ids"] == 1, -100)  # the answers
    advantages = torch.tensor([[1.0], [-0.5], [0.25], [-2.0]]).expand(labels.shape)
    rows, n = (batch["input_ids"], labels, advantages), float((labels >= 0).sum())
    textbook, plain, compiled, sharded = Policy(), Policy(), Policy(), fully_shard(Policy())
    textbook_loss(textbook, *rows, n).backward()
    plain(*rows, n).backward()
    torch.compile(compiled, backend=backend)(*rows, n).backward()
    # FSDP averages gradients over the ranks, so a rank's normaliser is its share of the tokens.
    sharded(*(x[rank::num_ranks] for x in rows), n / num_ranks).backward()
    for name, policy in {"plain": plain, "compiled": compiled, "FSDP2": sharded}.items():
        for param, expected in zip(policy.parameters(), textbook.parameters(), strict=True):
            grad = param.grad.full_tensor() if policy is sharded else param.grad
            torch.testing.assert_close(grad, expected.grad, rtol=0, atol=1e-5)
        print(f"rank {rank}: {name} has the textbook's gradients")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
