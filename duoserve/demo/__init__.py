"""A small trained MoE that ships with the package; see README.md here."""
