package tee

import (
	"bytes"
	"fmt"
	"os"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TDREPORT_STRUCT of the Intel TDX Module Base Architecture Specification: REPORTMACSTRUCT, TEE_TCB_INFO and TDINFO_STRUCT.
const (
	tdReportBytes    = 1024
	tdReportType     = 0x81 // TDX, in the first byte
	tdReportData     = 128
	tdInfo           = 512
	tdMRConfigID     = tdInfo + 8 + 8 + 48 // behind ATTRIBUTES, XFAM and MRTD
	tdMRConfigIDSize = 48
)

// getReport0 is TDX_CMD_GET_REPORT0 of the kernel's include/uapi/linux/tdx-guest.h: _IOWR('T', 1, struct tdx_report_req).
const getReport0 = 3<<30 | unsafe.Sizeof(tdReportRequest{})<<16 | 'T'<<8 | 1

// tdReportRequest is struct tdx_report_req.
type tdReportRequest struct {
	reportData [64]byte
	tdReport   [tdReportBytes]byte
}

// tdReport gets the TDX module's report of this guest. The kernel makes a TDCALL for it; no host takes part.
func tdReport(reportData [64]byte) ([]byte, error) {
	f, err := os.OpenFile("/dev/tdx_guest", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	req := tdReportRequest{reportData: reportData}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), getReport0, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return nil, fmt.Errorf("%s: %w", f.Name(), errno)
	}
	return req.tdReport[:], nil
}

// parseTDReport returns MRCONFIGID of the report that answers the report data.
func parseTDReport(b []byte, reportData [64]byte) ([]byte, error) {
	if len(b) != tdReportBytes || b[0] != tdReportType {
		return nil, fmt.Errorf("TEE: not a report of the TDX module: %d bytes: %w", len(b), errdefs.ErrInternal)
	}
	if !bytes.Equal(b[tdReportData:][:len(reportData)], reportData[:]) {
		return nil, fmt.Errorf("TEE: the TDX module's report answers another question: %w", errdefs.ErrInternal)
	}
	return bytes.Clone(b[tdMRConfigID:][:tdMRConfigIDSize]), nil
}
