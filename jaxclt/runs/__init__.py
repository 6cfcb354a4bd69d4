"""What a long run needs: its directory held, its pace told, its work kept."""
