// Command vsockdial is a test program that containers run to attack the
// guest's vsock ports. It connects to CID and PORT, waits two seconds whether
// the peer closes and says in one line what happened:
//
//	status 0  "connected": the peer accepts and keeps the connection
//	status 1  "refused: REASON": no connection
//	status 3  "closed": the peer accepted and closed again
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/mdlayher/vsock"
)

func main() {
	status, text := dial(os.Args[1:])
	fmt.Println(text)
	os.Exit(status)
}

func dial(args []string) (status int, text string) {
	if len(args) != 2 {
		return 2, "usage: vsockdial CID PORT"
	}
	cid, err := strconv.ParseUint(args[0], 10, 32)
	if err != nil {
		return 2, err.Error()
	}
	port, err := strconv.ParseUint(args[1], 10, 32)
	if err != nil {
		return 2, err.Error()
	}
	conn, err := vsock.Dial(uint32(cid), uint32(port), nil)
	if err != nil {
		return 1, "refused: " + err.Error()
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return 2, err.Error()
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return 3, "closed: " + err.Error()
	}
	return 0, "connected"
}
