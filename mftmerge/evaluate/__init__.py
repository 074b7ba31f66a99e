"""What a masked model can do: held-out loss by row, generated answers, tests, and the tables of them."""
