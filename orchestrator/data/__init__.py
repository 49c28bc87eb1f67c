"""From a user's data set to rows of token ids: loading, formats, tokenising, truncation, packing, order."""
