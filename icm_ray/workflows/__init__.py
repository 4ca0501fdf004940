"""What each job does once its recipe is read: one verb, one file a job."""
