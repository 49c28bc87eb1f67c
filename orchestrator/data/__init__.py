"""From a data set as a user has it to rows of token ids: loading, formats, tokenising, fitting, packing, order."""
