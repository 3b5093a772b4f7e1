"""The federation: one client's local steps, the mean over clients, the mesh that holds them, and the compiled rounds."""
