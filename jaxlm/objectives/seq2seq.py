"""A text about another: the decoder's next token, given what the encoder has read (Sutskever et al., arXiv:1409.3215)."""

from jaxlm.objectives.next_token import build_loss_of_targets
from jaxlm.objectives.objective import OBJECTIVES


@OBJECTIVES.register("seq2seq")
def seq2seq(config):
    """Cross-entropy of the decoder's tokens, in nats; aux["nll"] leaves out what that of `next_token` does. Segment k of
    a row looks at segment k of its source."""
    loss_of_targets = build_loss_of_targets(config)

    def objective(model, batch, keys_B=None):
        memory = model.encode(batch["source_tokens"], batch["source_positions"], batch["source_segment_ids"], keys_B=keys_B)
        x_BTD, _, stats = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], keys_B=keys_B, memory=memory)
        return loss_of_targets(model, batch, x_BTD, stats)

    return objective
