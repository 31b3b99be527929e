"""Budget: what it learns, and how one budget of blocks is spent over a video; our own."""
