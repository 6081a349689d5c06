"""The catalogue of laws: importing it fills it."""

from __future__ import annotations

from effattn.properties import (  # noqa: F401  each import adds its laws
    laws_bias_gradients,
    laws_dropout,
    laws_gradients,
    laws_masks,
    laws_memory,
    laws_numbers,
    laws_options,
    laws_structure,
    laws_values,
)
from effattn.properties.law import FAMILIES, LAWS, Law


def all_laws() -> dict[str, Law]:
    """All laws by name, family by family."""
    order = list(FAMILIES)
    return dict(sorted(LAWS.items(), key=lambda item: order.index(item[1].family)))


#: Why a law is kept though the comparison with exact attention sees every kernel of the zoo that breaks it as well.
KEPT: dict[str, str] = {
    "one_key_returns_its_value": "holds in bits for any score, those too large to be judged included",
    "equal_values_are_returned": "tells the normaliser from the scores: whatever the weights are, they sum to 1",
    "output_lies_between_the_smallest_and_the_largest_value": "needs no reference, and holds in rows that are set aside",
    "equal_scores_average_the_values": "tells sums from exponentials, which are all 1 here",
    "a_dominant_key_wins": "tells masks and offsets from rounding: the output is a row of V, in bits",
    "a_vector_added_to_every_key_changes_nothing": "the invariance that kernels rely on which centre K",
    "the_output_is_additive_in_the_values": "says that what happens to V is linear",
    "one_hot_values_show_weights_that_sum_to_one": "shows the attention matrix: a wrong weight is told by its key",
    "columns_of_zeros_in_q_and_k_change_nothing": "tells the padding of head_dim from the scale",
    "a_row_that_sees_no_key_is_zero": "names the mistake: 0 / 0, a mean of V, or what the memory held",
    "without_keys_the_output_is_zero": "names the early return that writes nothing",
    "the_last_queries_of_a_prefill_are_those_of_a_chunk": "names the alignment that chunked prefill needs",
    "with_top_left_alignment_later_keys_are_not_seen": "names the alignment",
    "the_edges_of_the_window_are_seen": "tells on which side the window is off, and by what",
    "the_diagonal_is_seen": "names the query's own key",
    "alibi_is_its_bias": "tells ALiBi from the bias: one of the two is right",
    "permuting_the_keys_changes_nothing": "tells what depends on a key's place from what does not",
    "decoding_gives_the_last_row_of_prefill": "compares two paths that a server takes for one token",
    "no_logit_is_too_large_for_the_output": "names the overflow, and holds in rows that are set aside",
    "very_negative_scores_are_scores_like_others": "names padding that is counted with a score of 0",
    "subnormal_inputs_are_not_zero": "names the flush",
    "a_repeated_maximum_leaves_no_one_sided_error": "names the bias, which a single verdict only measures",
    "the_gradient_of_v_is_linear_in_the_upstream_gradient": "needs no reference; tells dV from P",
    "a_shift_of_all_keys_leaves_the_loss": "tells delta from the rest of dS: its rows sum to 0",
    "dv_and_the_output_agree": "ties backward to forward: the same P, mask and dropout in both",
    "dq_and_dk_agree": "ties dQ to dK: a factor that one of them lacks is told",
    "keys_that_nobody_sees_have_no_gradient": "names tiles of dK and dV that nobody writes",
    "gradients_of_shared_keys_are_summed_over_the_group": "names the sum over the group",
    "gradients_of_bias_and_sinks_are_derivatives_of_the_output": "needs no formula of the backward pass",
    "a_bias_at_hidden_keys_has_no_gradient": "names the mask that dBias lacks",
    "a_shift_of_all_logits_leaves_the_loss": "ties dBias to dSinks: a row of both sums to 0",
    "kept_weights_are_scaled_up": "names the factor 1 / (1 - p)",
    "backward_drops_the_weights_that_forward_dropped": "names the mask that backward draws again",
}
