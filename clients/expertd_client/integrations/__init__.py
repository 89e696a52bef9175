"""Other libraries' models with their experts on servers; each module needs its library."""
