"""Models. Arrays carry their axes as a suffix, and einsums use the same letters:

B batch, T query position, S key position, D embed, N heads, K key/value heads, G query heads per key/value head,
H head_dim, F mlp, V vocabulary, L layers (stacked), A accumulation step; in a mixture of experts E experts, K chosen experts of
a token, C places of an expert, X rows (a token and one of its choices, or any).
"""
