"""What the machine itself does: copies, matrix products, launches, and on a GPU what a recurrent kernel's step is made
of. ``python -m benchmarks.micro``; README.md says what each number decides."""
