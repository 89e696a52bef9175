"""What can run where: every claim a row of data, every refusal a list of reasons."""
