"""Quality: the paper's protocol, with judges, experiments, pictures and a report."""
