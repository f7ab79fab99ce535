//go:build tools

// What the conformance run builds: the suite of Gateway API, whose test binary is made by `go test -c`, and the two programs of
// the echo image that the suite starts in its pods.
package tools

import (
	_ "istio.io/istio/pkg/test/echo/cmd/client"
	_ "istio.io/istio/pkg/test/echo/cmd/server"
	_ "sigs.k8s.io/gateway-api/conformance"
)
