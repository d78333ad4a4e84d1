// Package openapitest checks the OpenAPI description that package taskhttp serves,
// and requests and responses against it, with a validator that is not part of this
// project. It is a module of its own because of that dependency.
package openapitest
