package main

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// refused answers what the stand-in does not do. Saying so is better than an
// empty success: pods in the tests use the guest's own network namespace.
type refused struct{}

func refuse(method string) error {
	return fmt.Errorf("%s: the agent's stand-in does not do this: %w", method, errdefs.ErrNotImplemented)
}

func (refused) UpdateInterface(context.Context, *pb.UpdateInterfaceRequest) (*protocols.Interface, error) {
	return nil, refuse("UpdateInterface")
}

func (refused) UpdateRoutes(context.Context, *pb.UpdateRoutesRequest) (*pb.Routes, error) {
	return nil, refuse("UpdateRoutes")
}

func (refused) ListInterfaces(context.Context, *pb.ListInterfacesRequest) (*pb.Interfaces, error) {
	return nil, refuse("ListInterfaces")
}

func (refused) ListRoutes(context.Context, *pb.ListRoutesRequest) (*pb.Routes, error) {
	return nil, refuse("ListRoutes")
}

func (refused) AddARPNeighbors(context.Context, *pb.AddARPNeighborsRequest) (*emptypb.Empty, error) {
	return nil, refuse("AddARPNeighbors")
}

func (refused) GetIPTables(context.Context, *pb.GetIPTablesRequest) (*pb.GetIPTablesResponse, error) {
	return nil, refuse("GetIPTables")
}

func (refused) SetIPTables(context.Context, *pb.SetIPTablesRequest) (*pb.SetIPTablesResponse, error) {
	return nil, refuse("SetIPTables")
}

func (refused) MemAgentMemcgSet(context.Context, *pb.MemAgentMemcgConfig) (*emptypb.Empty, error) {
	return nil, refuse("MemAgentMemcgSet")
}

func (refused) MemAgentCompactSet(context.Context, *pb.MemAgentCompactConfig) (*emptypb.Empty, error) {
	return nil, refuse("MemAgentCompactSet")
}

func (refused) AddSwap(context.Context, *pb.AddSwapRequest) (*emptypb.Empty, error) {
	return nil, refuse("AddSwap")
}

func (refused) AddSwapPath(context.Context, *pb.AddSwapPathRequest) (*emptypb.Empty, error) {
	return nil, refuse("AddSwapPath")
}

func (refused) ResizeVolume(context.Context, *pb.ResizeVolumeRequest) (*emptypb.Empty, error) {
	return nil, refuse("ResizeVolume")
}
