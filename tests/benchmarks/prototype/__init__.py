"""The prototype of the exact accounting, and programs that do nothing: what the product's cost is compared with."""
