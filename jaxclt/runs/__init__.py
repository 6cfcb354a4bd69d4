"""What a long run needs: a directory to itself, progress in lines, its work kept."""
