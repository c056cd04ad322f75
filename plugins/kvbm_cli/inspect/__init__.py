"""The verb `kvbm inspect`: what lies in a tier's place, and which fact of two namespaces differs."""
