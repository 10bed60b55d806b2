"""All-reduces side by side: the variants, how each is timed, the figure."""
