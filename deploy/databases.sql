-- A database and an owner of its own for Prefect and for MLflow; run again, it sets the passwords anew.
\getenv prefect_password PREFECT_DATABASE_PASSWORD
\getenv mlflow_password MLFLOW_DATABASE_PASSWORD
SELECT format('CREATE ROLE %I LOGIN', name) FROM (VALUES ('prefect'), ('mlflow')) AS role (name)
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec
ALTER ROLE prefect PASSWORD :'prefect_password';
ALTER ROLE mlflow PASSWORD :'mlflow_password';
SELECT format('CREATE DATABASE %I OWNER %I', name, owner)
FROM (VALUES ('prefect', 'prefect'), ('mlflow', 'mlflow'), ('mlflow_auth', 'mlflow')) AS wanted (name, owner)
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name) \gexec
REVOKE CONNECT ON DATABASE prefect, mlflow, mlflow_auth FROM PUBLIC;
