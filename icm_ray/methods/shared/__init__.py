"""What several methods use: trimming, votes, sums, bases and kinds of parameters."""
