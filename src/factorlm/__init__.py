"""factorlm: language models whose feed-forward layers are structured matrices."""
