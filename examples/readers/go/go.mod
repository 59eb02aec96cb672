module vmsnap-reader

go 1.19

require (
	filippo.io/age v1.2.1
	github.com/fxamacker/cbor/v2 v2.7.0
	golang.org/x/sys v0.21.0
)

require (
	github.com/x448/float16 v0.8.4 // indirect
	golang.org/x/crypto v0.24.0 // indirect
)
