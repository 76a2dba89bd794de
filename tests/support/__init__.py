"""What tests share: models, cases, servers, builds. No test imports another test; both import from here."""
