"""Attribution graphs: targets, edges, influence, pruning, scores, certificate."""
