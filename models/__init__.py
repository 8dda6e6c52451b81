"""Networks: flax.linen modules and the functions that apply them."""
